"""Jobs of several processes: their number does not show in the result.

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
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from slimplus.pipeline import run as pipeline
from slimplus.recipe.parsing import load_recipe
from slimplus.training.reconstruction import BlockReconstruction
from tests.support.models import ModelMaker
from tests.support.processes import ROOT
from tests.support.recipes import SMALL

EPOCHS, TIMEOUT = 4, 240
SETTINGS = (
    "recipe=smollm2_135m_2bit",
    *SMALL,
    "data.samples=16",
    f"training.epochs={EPOCHS}",
    "training.batch_size=2",
    "trainer.accelerator=cpu",
)


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
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
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
