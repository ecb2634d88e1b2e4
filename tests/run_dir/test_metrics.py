"""What is kept of a stage: its seconds, and what ended it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from slimplus.blockwise import swap
from slimplus.utils.errors import InputError
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics, run


def test_an_interrupted_stage_counts_its_seconds(
    copy: Path, monkeypatch: pytest.MonkeyPatch, arguments: Arguments
) -> None:
    """One that is killed gets to write nothing at its end: those of finished blocks are on disk by then."""

    def seconds() -> float:
        return float(read_metrics(copy)["seconds"]["blocks"])

    def packed_block(*given: Any) -> Any:
        on_disk.append(seconds())
        if len(on_disk) == 2:
            raise KeyboardInterrupt
        return swap.packed_block(*given)

    on_disk, before = list[float](), seconds()
    for index in range(2):
        (copy / f"blocks/block_{index:03d}.safetensors").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("slimplus.pipeline.stages.blocks.packed_block", packed_block)
        with pytest.raises(KeyboardInterrupt):
            run(arguments(copy))
    first, second = on_disk
    interrupted = seconds()
    assert before == first < second < interrupted
    run(arguments(copy))
    assert seconds() > interrupted


def test_a_device_that_is_too_small_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Arguments
) -> None:
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    monkeypatch.setattr("slimplus.pipeline.stages.evaluate.perplexity", full)
    with pytest.raises(InputError, match=r"^full_precision: out of device memory \(CUDA out of memory.*is kept$"):
        run(arguments(tmp_path))
