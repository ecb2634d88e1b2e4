"""Files that a run reads back or is given beside the model: whatever is in them, a clear error or plain values."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Bomb, damaged, fuzz, refusal
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric import Fabric

from slimplus.run_dir.allocation_file import read_allocation
from slimplus.training.checkpoints import Attempt, TrainingCheckpoints
from slimplus.utils.errors import InputError
from slimplus.utils.manifest import Manifest


@pytest.mark.parametrize("damage", ["pickle", "cut", "empty"])
def test_training_checkpoints_hold_tensors_and_plain_values_only(tmp_path: Path, damage: str) -> None:
    checkpoints = TrainingCheckpoints(tmp_path, Manifest(tmp_path), "")
    torch.save({"state_dict": {"weight": torch.ones(100)}}, checkpoints.path)
    assert checkpoints.load_checkpoint(checkpoints.path)["state_dict"]["weight"].sum() == 100
    if damage == "pickle":
        torch.save({"state_dict": {}, "loops": Bomb(tmp_path / "exploded")}, checkpoints.path)
    else:
        checkpoints.path.write_bytes(checkpoints.path.read_bytes()[: 500 if damage == "cut" else 0])
    with pytest.raises(InputError, match=r"last\.ckpt is no checkpoint of tensors and plain values; delete"):
        checkpoints.load_checkpoint(checkpoints.path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(("share", "kept"), [(4, True), (8, True), (2, False)])
def test_a_split_that_more_devices_cannot_take_is_given_up(tmp_path: Path, share: int, kept: bool) -> None:
    checkpoints, fabric = (
        TrainingCheckpoints(tmp_path, Manifest(tmp_path), "before"),
        Fabric(accelerator="cpu", devices=1),
    )
    first = Attempt("before", parts=1)
    checkpoints.renew(replace(first, split=4, events=("out of memory",)))
    attempt, found = checkpoints.begin(first, fabric, share)
    assert attempt.split == (4 if kept else 1)
    assert not found


@fuzz(1000)
@given(data=st.data())
def test_a_damaged_allocation_is_refused_or_holds_widths(tmp_path: Path, data: st.DataObject) -> None:
    allocation: Any = {"target_bits": 2, "group_size": 16, "bits": {"a": [1, 2, 3], "b": [2, 2]}}
    for _ in range(data.draw(st.integers(1, 2))):
        allocation = damaged(allocation, lambda options: data.draw(st.sampled_from(options)))
    text = json.dumps(allocation)
    file = tmp_path / "allocation.json"
    file.write_text(text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text)
    if (said := refusal(lambda: read_allocation(file, 16, "model.layers"))) is not None:
        assert "quantization.allocation" in said
        return
    bits = read_allocation(file, 16, "model.layers")
    assert all(type(width) is int and 1 <= width <= 8 for widths in bits.values() for width in widths)


@fuzz(300)
@given(data=st.data())
def test_a_damaged_published_allocation_is_refused_or_holds_widths(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "Llama.pt"
    torch.save({0: {"self_attn.q_proj": [1, 2, 3], "mlp.up_proj": [2, 2, 2]}}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    if (said := refusal(lambda: read_allocation(file, 16, "model.layers"))) is not None:
        assert "quantization.allocation" in said
        return
    bits = read_allocation(file, 16, "model.layers")
    assert all(name.startswith("model.layers.") for name in bits)
    assert all(type(width) is int and 1 <= width <= 8 for widths in bits.values() for width in widths)


@pytest.mark.parametrize("content", [[1, 2], {"a": {"b": [2]}}, {0: [2]}, {0: {"q": [9]}}, {0: {"q": torch.ones(2)}}])
def test_a_file_of_torch_that_is_no_allocation(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "widths.pt")
    with pytest.raises(InputError, match=r"^quantization\.allocation: .*widths\.pt .*; give"):
        read_allocation(tmp_path / "widths.pt", 16, "model.layers")


def test_a_zip_file_that_spans_disks_is_no_allocation(tmp_path: Path) -> None:
    locator, end = struct.pack("<4sLQL", b"PK\x06\x07", 1, 0, 2), b"PK\x05\x06" + bytes(18)
    (tmp_path / "widths.pt").write_bytes(locator + end)
    with pytest.raises(InputError, match=r"^quantization\.allocation: .*multiple disks.*; give"):
        read_allocation(tmp_path / "widths.pt", 16, "model.layers")


def test_code_in_a_published_allocation_is_not_run(tmp_path: Path) -> None:
    torch.save({0: Bomb(tmp_path / "exploded")}, tmp_path / "widths.pt")
    with pytest.raises(InputError, match="holds more than plain widths"):
        read_allocation(tmp_path / "widths.pt", 16, "model.layers")
    assert not (tmp_path / "exploded").exists()
