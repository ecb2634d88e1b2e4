"""Several processes: who does what, which windows meet in a step, and that their number does not show in the result.

Run as a script, this file is what the processes of a job execute: several runs one after the other.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SMALL, ModelMaker
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import distributed as scaling
from slimplus.blockwise import data
from slimplus.blockwise.calibrate import BlockResult, quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.distributed.ranks import Ranks
from slimplus.distributed.strategies import launch
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.pipeline import run as pipeline
from slimplus.quantization.linear import Method, QuantizationConfig
from slimplus.quantization.salience import HessianAccumulator
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.preflight import check_inputs, check_shares
from slimplus.training.reconstruction import BlockReconstruction
from slimplus.training.sampler import StepSampler
from slimplus.utils.errors import InputError

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
EPOCHS, TIMEOUT = 4, 240
SETTINGS = (
    "recipe=smollm2_135m_2bit",
    *SMALL,
    "data.samples=16",
    f"training.epochs={EPOCHS}",
    "training.batch_size=2",
    "trainer.accelerator=cpu",
)


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 100), min_size=1), st.integers(1, 5))
def test_work_is_shared_out_by_size(costs: dict[str, int], count: int) -> None:
    owners = Ranks(0, count).owners(costs)
    assert owners == Ranks(count - 1, count).owners(dict(reversed(costs.items()))), "ranks must agree"
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(count)]
    assert sum(loads) == sum(costs.values())
    assert max(loads) <= min(loads) + max(costs.values())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 3))
def test_a_step_takes_the_same_windows_on_any_number_of_ranks(count: int, share: int, steps: int, epoch: int) -> None:
    batch_size = count * share

    def windows(rank: int, ranks: int) -> list[list[int]]:
        """What `rank` takes in each step of an epoch."""
        sampler = StepSampler(steps * batch_size, batch_size, Ranks(rank, ranks), seed=3)
        sampler.set_epoch(epoch)
        order = [place * ranks + rank for place in sampler]
        assert len(order) == len(sampler)
        return [order[start : start + batch_size // ranks] for start in range(0, len(order), batch_size // ranks)]

    alone = [set(step) for step in windows(0, 1)]
    together = [set().union(*parts) for parts in zip(*(windows(rank, count) for rank in range(count)), strict=True)]
    assert together == alone
    assert set().union(*alone) == set(range(steps * batch_size))
    assert all(len(step) == batch_size for step in alone)


@pytest.mark.parametrize(
    ("offload", "strategy", "needed"),
    [
        ("optimizer", "ddp", "deepspeed_stage_1 or deepspeed_stage_2 or deepspeed_stage_3, got ddp"),
        ("parameters", "deepspeed_stage_2", "deepspeed_stage_3, got deepspeed_stage_2"),
    ],
)
def test_offloading_needs_a_stage_that_can(offload: str, strategy: str, needed: str) -> None:
    with pytest.raises(InputError, match=f"trainer.offload: {offload} needs trainer.strategy={needed}"):
        load_recipe([SETTINGS[0], f"trainer.strategy={strategy}", f"trainer.offload={offload}"])


@pytest.mark.parametrize("section", ["training", "end_to_end"])
def test_8bit_moments_are_not_sharded(section: str) -> None:
    with pytest.raises(InputError, match=rf"^{section}\.optimizer: DeepSpeed cannot shard the moments of adamw_8bit"):
        load_recipe([SETTINGS[0], f"{section}.optimizer=adamw_8bit", "trainer.strategy=deepspeed_stage_2"])
    load_recipe([SETTINGS[0], f"{section}.optimizer=adamw_8bit", "trainer.strategy=ddp"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("trainer.devices=3", "data.samples: 16 windows cannot be shared evenly by 3 processes; give a multiple of 3"),
        (
            "trainer.devices=4",
            "training.batch_size: 2 windows a step cannot be shared evenly by 4 processes in 1 parts",
        ),
        ("training.accumulate_grad_batches=4", "by 1 processes in 4 parts each .* give a multiple of 4"),
        ("training.batch_size=3", "data.samples: 16 windows are no whole number of steps of 3"),
        (
            "trainer.devices=4 training.batch_size=4",
            "data.evaluation.windows: 2 is less than one for each of 4 processes",
        ),
    ],
)
def test_windows_that_cannot_be_shared_evenly(keys: str, said: str) -> None:
    """Before PyTorch is loaded and a process started."""
    with pytest.raises(InputError, match=said):
        check_inputs(load_recipe([*SETTINGS, *keys.split()]))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_benchmarks_windows_can_be_shared(processes: int) -> None:
    keys = scaling.measured_keys("ddp", processes, 10, [scaling.RECIPE, *scaling.METHOD])
    check_shares(load_recipe(keys), processes)


def test_torchrun_must_start_as_many_processes_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun has started 2 processes; give its --nproc-per-node"):
        launch("cpu", devices=1, num_nodes=1, strategy="auto")


def test_epochs_differ_in_their_order() -> None:
    sampler = StepSampler(32, 2, Ranks(), seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == list(range(32))
    assert first != list(sampler)


def test_the_search_looks_at_the_same_windows_on_any_number_of_ranks() -> None:
    for total in (1, 5, 8):
        assert sum(Ranks(rank, 3).windows(total) for rank in range(3)) == total
    assert [Ranks(rank, 3).windows(1) for rank in range(3)] == [1, 0, 0]


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_a_hessian_does_not_show_how_its_windows_were_shared(seed: int, count: int) -> None:
    inputs = torch.randn(12, 16, 24, generator=torch.Generator().manual_seed(seed))
    sums = [HessianAccumulator(24, torch.device("cpu")) for _ in range(count)]
    for index, window in enumerate(inputs):
        sums[index % count].add(window)
    whole = HessianAccumulator(24, torch.device("cpu"))
    for window in inputs:
        whole.add(window)
    for part in sums[1:]:
        sums[0].total += part.total
        sums[0].tokens += part.tokens
    assert torch.equal(sums[0].hessian, whole.hessian)


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


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("method", ["rtn", "slimllm"])
def test_a_block_is_quantized_alike_by_any_number_of_ranks(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, method: Method, count: int
) -> None:
    """The search looks at 5 of 12 windows: an uneven share, and with 6 ranks none for the last."""
    monkeypatch.setattr(data, "SEARCH_TOKENS", 5 * 32)
    runner = BlockRunner(CPU, "32-true")
    streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), runner)
    tokens = torch.randint(1, 250, (12, 32), generator=torch.Generator().manual_seed(0))
    inputs = streamed.block_inputs(tokens)
    config = QuantizationConfig(method, 2, 16, allocation="slimllm" if method == "slimllm" else "uniform")
    meeting = Meeting(count)

    def quantize(ranks: Ranks) -> BlockResult:
        own = inputs.hidden[ranks.rank :: ranks.count]
        return quantize_block(BlockData(blocks.pop(), own, inputs.arguments[0], runner, ranks), config)

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


# Real processes


class Stopped(RuntimeError):
    """What a run that is to be resumed ends with."""


def run_until_the_second_block_trains(arguments: list[str]) -> None:
    """Leaves a finished block, and a checkpoint of half the epochs of the second."""
    begun: list[int] = []

    def begin(module: BlockReconstruction) -> None:
        begun.append(module.current_epoch)
        if len(begun) > EPOCHS + EPOCHS // 2:
            raise Stopped

    with mock.patch.object(BlockReconstruction, "on_train_epoch_start", begin), pytest.raises(Stopped):
        pipeline.run(load_recipe(arguments))


def torchrun(arguments: Sequence[str], node: int = 0, nodes: int = 1, port: int = 0) -> subprocess.Popen[str]:
    """The processes of one node, of two in all, on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={2 // nodes}", f"--nnodes={nodes}"]
    meeting = ["--standalone"] if nodes == 1 else [f"--node-rank={node}", "--master-addr=127.0.0.1"]
    ports = [f"--master-port={port}"] if port else []
    return subprocess.Popen(
        [*launcher, *meeting, *ports, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Waits for all; none may fail."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.fixture(scope="module")
def common(make_model: ModelMaker, text_file: Path) -> list[str]:
    """What all runs have in common."""
    texts = (f"data.calibration.path={text_file}", f"data.evaluation.path={text_file}")
    return [*SETTINGS, f"model.path={make_model('llama')}", *texts]


TOGETHER = {
    "ddp": ("trainer.strategy=ddp",),
    "stage_1": ("trainer.strategy=deepspeed_stage_1", "trainer.offload=optimizer"),
    "stage_2": ("trainer.strategy=deepspeed_stage_2",),
    "stage_3": ("trainer.strategy=deepspeed_stage_3", "trainer.offload=parameters"),
    "resumed_on_two": ("trainer.strategy=deepspeed_stage_3",),  # begun in one process
    "stopped_on_two": ("trainer.strategy=deepspeed_stage_2",),
}


@pytest.fixture(scope="module")
def runs(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one recipe by one process and by two, whole and resumed by the other number."""
    folder = tmp_path_factory.mktemp("runs")
    pipeline.run(load_recipe([*common, "training.accumulate_grad_batches=2", f"run_dir={folder / 'alone'}"]))
    run_until_the_second_block_trains([*common, f"run_dir={folder / 'resumed_on_two'}"])
    jobs = [[*common, "trainer.devices=2", *keys, f"run_dir={folder / name}"] for name, keys in TOGETHER.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    finish([torchrun([__file__, str(folder / "jobs.json")])])
    (folder / "stopped_on_two").rename(folder / "resumed_on_one")
    pipeline.run(load_recipe([*common, f"run_dir={folder / 'resumed_on_one'}"]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*list(TOGETHER)[:-1], "resumed_on_one"])
def test_two_processes_give_the_answer_of_one(runs: Path, name: str) -> None:
    """Nearly all of it bit for bit: sums of gradients are rounded in another order, and little of that is stored."""
    assert (runs / name / "allocation.json").read_bytes() == (runs / "alone/allocation.json").read_bytes()
    expected, found = (load_file(runs / run / "packed/model.safetensors") for run in ("alone", name))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.endswith("scales"):
            torch.testing.assert_close(found[key].float(), tensor.float(), rtol=2e-3, atol=1e-6)
        elif key.endswith("zeros"):
            assert (found[key].int() - tensor.int()).abs().max() <= 1
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.slow
def test_the_norm_of_the_gradient_is_logged_by_every_strategy(runs: Path) -> None:
    last = {}
    for name in ("alone", "ddp", "stage_1", "stage_2", "stage_3"):
        with (runs / name / "logs/csv/block_000/metrics.csv").open() as file:
            last[name] = [float(row["grad_norm"]) for row in csv.DictReader(file) if row["grad_norm"]][-1]
    for name, norm in last.items():
        assert norm == pytest.approx(last["alone"], rel=1e-3), name


@pytest.mark.slow
def test_two_nodes_of_torchrun_give_the_answer_of_one_process(runs: Path, common: list[str], tmp_path: Path) -> None:
    """Two launchers that find each other by address, as on two machines; the command is that of docs/distributed.md."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ("trainer.num_nodes=2", "trainer.strategy=ddp", f"run_dir={tmp_path / 'run'}")
    outputs = finish([torchrun(["train.py", *common, *nodes], node, nodes=2, port=port) for node in (0, 1)])
    assert [output.count("average bits") for output in outputs] == [1, 0], "only the first rank reports"
    expected, found = (folder / "packed/model.safetensors" for folder in (runs / "alone", tmp_path / "run"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "stage_1", "stage_2", "stage_3"])
def test_two_processes_train_the_whole_model_as_one_does(common: list[str], tmp_path: Path, name: str) -> None:
    """With the widths found over the whole model, and no training of blocks, so that they are the same."""
    keys = (
        "quantization.method=slimllm",
        "quantization.allocation=model",
        "end_to_end.epochs=2",
        "end_to_end.batch_size=4",
    )
    pipeline.run(load_recipe([*common, *keys, f"run_dir={tmp_path / 'alone'}"]))
    finish([torchrun(["train.py", *common, *keys, *TOGETHER[name], "trainer.devices=2", f"run_dir={tmp_path / name}"])])
    assert (tmp_path / name / "allocation.json").read_bytes() == (tmp_path / "alone/allocation.json").read_bytes()
    expected, found = (load_file(tmp_path / run / "end_to_end.safetensors") for run in ("alone", name))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.endswith("zeros"):
            assert (found[key].int() - tensor.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(found[key].float(), tensor.float(), rtol=5e-3, atol=1e-5)


def main(jobs: str) -> None:
    """Runs of which the last ends early."""
    *whole, stopped = json.loads(Path(jobs).read_text())
    for arguments in whole:
        pipeline.run(load_recipe(arguments))
    run_until_the_second_block_trains(stopped)


if __name__ == "__main__":
    main(sys.argv[1])
