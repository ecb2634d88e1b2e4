"""Hidden states in main memory and in files."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from slimplus.models.loading import ModelSource
from slimplus.models.prefetch import prefetched
from slimplus.models.state_cache import StateCache
from slimplus.models.streaming import BlockRunner, StreamedModel
from tests.support.blocks import CPU, RUNNER
from tests.support.models import ModelMaker


def is_in_file(tensor: torch.Tensor, folder: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return path.startswith(str(folder))
    return False


def test_states_beyond_the_limit_lie_in_files_without_a_name(tmp_path: Path) -> None:
    cache = StateCache(1000, tmp_path / "states")
    first = cache.empty((10, 20), torch.float32)
    second = cache.empty((5, 10, 4), torch.bfloat16)
    assert cache.used == 800
    assert not is_in_file(first, tmp_path)
    assert is_in_file(second, tmp_path)
    assert not list((tmp_path / "states").iterdir())
    second.copy_(torch.arange(200.0).view(5, 10, 4))
    assert torch.equal(second, torch.arange(200.0).view(5, 10, 4).bfloat16())
    del first
    gc.collect()
    assert cache.used == 0
    assert not is_in_file(cache.empty((10, 20), torch.float32), tmp_path)


def test_without_a_limit_all_states_are_in_main_memory() -> None:
    assert StateCache().empty((0, 3), torch.float32).shape == (0, 3)
    assert StateCache(0, Path("/nowhere")).empty((0, 3), torch.float32).shape == (0, 3)


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space|too large"):
        StateCache(0, tmp_path).empty((2**20, 2**20, 2**10), torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_blocks_give_the_same_bits_from_files(
    make_model: ModelMaker, tokens: torch.Tensor, tmp_path: Path, precision: str
) -> None:
    results = []
    for cache in (StateCache(), StateCache(0, tmp_path)):
        runner = BlockRunner(CPU, precision, cache=cache)
        streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), runner)
        inputs = streamed.block_inputs(tokens)
        results.append([inputs.hidden, *streamed.forward_blocks(inputs)])
    assert all(map(torch.equal, *results))
    assert all(is_in_file(tensor, tmp_path) for tensor in results[1])
    assert not any(is_in_file(tensor, tmp_path) for tensor in results[0])


def test_batches_come_in_order() -> None:
    hidden = torch.randn(5, 3, 2)
    found = list(prefetched(hidden, 2, CPU))
    assert [list(windows) for windows, _ in found] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([states for _, states in found]), hidden)
    assert not list(prefetched(hidden[:0], 2, CPU))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_that_are_copied_ahead_are_those_that_were_asked_for() -> None:
    hidden = torch.randn(7, 512, 256)
    found = [(list(windows), states.cpu()) for windows, states in prefetched(hidden, 3, torch.device("cuda", 0))]
    assert [windows for windows, _ in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(torch.cat([states for _, states in found]), hidden)


def test_capturing_inputs_keeps_no_outputs(make_model: ModelMaker, tokens: torch.Tensor, tmp_path: Path) -> None:
    from slimplus.blockwise.data import BlockData

    streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), RUNNER)
    inputs = streamed.block_inputs(tokens)
    cache = StateCache(0, tmp_path / "states")
    runner = BlockRunner(CPU, "32-true", cache=cache)
    seen: list[torch.Tensor] = []
    data = BlockData(runner.load(streamed.block(0)), inputs.hidden, inputs.arguments[0], runner)
    data.capture_inputs({"self_attn.q_proj": seen.append})
    assert len(seen) == 3
    assert not (tmp_path / "states").exists()
