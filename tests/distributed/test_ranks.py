"""Several ranks without processes: who does what, and that their number does not show in a quantized block."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimplus.blockwise import data
from slimplus.blockwise.calibrate import BlockResult, quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.distributed.ranks import Ranks
from slimplus.distributed.strategies import launch
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.quantization.linear import Method, QuantizationConfig, Search
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker

CPU = torch.device("cpu")


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 100), min_size=1), st.integers(1, 5))
def test_work_is_shared_out_by_size(costs: dict[str, int], count: int) -> None:
    owners = Ranks(0, count).owners(costs)
    assert owners == Ranks(count - 1, count).owners(dict(reversed(costs.items()))), "ranks must agree"
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(count)]
    assert sum(loads) == sum(costs.values())
    assert max(loads) <= min(loads) + max(costs.values())


def test_torchrun_must_start_as_many_processes_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun has started 2 processes; give its --nproc-per-node"):
        launch("cpu", devices=1, num_nodes=1, strategy="auto")


def test_the_search_looks_at_the_same_windows_on_any_number_of_ranks() -> None:
    for total in (1, 5, 8):
        assert sum(Ranks(rank, 3).windows(total) for rank in range(3)) == total
    assert [Ranks(rank, 3).windows(1) for rank in range(3)] == [1, 0, 0]


def test_layers_are_shared_out_and_those_of_one_hessian_stay_together(make_model: ModelMaker) -> None:
    runner = BlockRunner(CPU, "32-true")
    streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), runner)
    inputs = streamed.block_inputs(torch.ones(1, 8, dtype=torch.int64))
    block = runner.load(streamed.blocks[0])
    shares = [
        BlockData(block, inputs.hidden, inputs.arguments[0], runner, Ranks(rank, 2)).own_layers.keys()
        for rank in range(2)
    ]
    assert set(shares[0]) == {"mlp.down_proj"}  # as costly as all the others together
    assert set(shares[1]) == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *("mlp.gate_proj", "mlp.up_proj"),
    }


class Meeting:
    """Where the ranks of a job in threads hand each other tensors."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.brought: list[Tensor] = [torch.empty(0)] * count

    def gather(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.brought[rank] = tensor.clone()
        self.barrier.wait()
        brought = list(self.brought)
        self.barrier.wait()
        return brought


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.meeting.gather(self.rank, tensor)).sum(dim=0))

    def sum_on(self, owner: int, tensor: Tensor) -> Tensor:
        total = self.sum(tensor)
        return total if owner == self.rank else total.fill_(torch.nan)

    def send(self, owner: int, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.meeting.gather(self.rank, tensor)[owner])


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_rows_of_all_ranks_come_back_in_order(count: int) -> None:
    whole, meeting = torch.arange(20).view(5, 2, 2), Meeting(count)  # with 6 ranks, none for the last

    def gather(rank: int) -> Tensor:
        return ThreadRanks(rank, count, meeting).gather(whole[rank::count], len(whole))

    with ThreadPoolExecutor(count) as pool:
        assert all(torch.equal(gathered, whole) for gathered in pool.map(gather, range(count)))


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize(("method", "strength"), [("rtn", 0.0), ("slimllm", 0.0), ("slimllm", 1.0)])
def test_a_block_is_quantized_alike_by_any_number_of_ranks(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, method: Method, strength: float, count: int
) -> None:
    """The search looks at 5 of 12 windows: an uneven share, and with 6 ranks none for the last."""
    monkeypatch.setattr(data, "SEARCH_TOKENS", 5 * 32)
    runner = BlockRunner(CPU, "32-true")
    streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), runner)
    tokens = torch.randint(1, 250, (12, 32), generator=torch.Generator().manual_seed(0))
    inputs = streamed.block_inputs(tokens)
    search: Search = "slimllm" if method == "slimllm" else "uniform"
    config = QuantizationConfig(method, 2, 16, allocation=search, error_propagation=strength)
    full = inputs.hidden + 0.1 * torch.randn(inputs.hidden.shape, generator=torch.Generator().manual_seed(1))
    meeting = Meeting(count)

    def quantize(ranks: Ranks) -> BlockResult:
        own, own_full = (states[ranks.rank :: ranks.count] for states in (inputs.hidden, full))
        return quantize_block(BlockData(blocks.pop(), own, inputs.arguments[0], runner, ranks, own_full), config)

    blocks = [runner.load(streamed.blocks[0]) for _ in range(count + 1)]  # hooks are not to be shared
    alone = quantize(Ranks())
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(quantize, (ThreadRanks(rank, count, meeting) for rank in range(count))))
    for result in results:
        assert result.percdamp == alone.percdamp
        for name, weight in alone.weights.items():
            for part in ("integers", "scale", "zero_point", "bits"):
                assert torch.equal(getattr(result.weights[name], part), getattr(weight, part)), (name, part)
    if method == "slimllm":
        assert any((weight.bits != 2).any() for weight in alone.weights.values())
