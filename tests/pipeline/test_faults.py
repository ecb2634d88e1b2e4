"""Runs that are killed, pre-empted or starved, and trainings that go wrong: each ends well, and says what happened."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import faulty
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics

SHIPPED = ("packed/model.safetensors", "packed/config.json", "allocation.json")
# Each epoch has 8 steps, and each step a checkpoint.
OFTEN = ("trainer.checkpoint_seconds=0", "data.samples=8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faulty.Server]:
    server = faulty.Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(arguments: Arguments, server: faulty.Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to; `events` beside it holds how many events it had."""
    folder = tmp_path_factory.mktemp("undisturbed")
    status, said = server(arguments(folder / "run", *OFTEN), count=str(folder / "events"))
    assert status == 0, said
    return folder / "run"


def assert_same(folder: Path, undisturbed: Path) -> None:
    for name in SHIPPED:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    ours, theirs = (read_metrics(each)["blocks"] for each in (folder, undisturbed))
    for one, other in zip(ours, theirs, strict=True):
        assert (one["loss"], one["calibrated_loss"]) == (other["loss"], other["calibrated_loss"])
    assert not [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".replaced"))]


STARTING = 45  # events until the blocks begin, about
STEPS = 16  # of a block: 8 windows in each of 2 epochs


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(
    arguments: Arguments, server: faulty.Server, undisturbed: Path, tmp_path: Path
) -> None:
    events, moments = int((undisturbed.parent / "events").read_text()), random.Random(0)
    kills = runs = resumed_within_an_epoch = 0
    while kills < 20:
        folder, status = tmp_path / str(runs), 1
        while status:
            # One in four while it starts; the others, in the mean, an eighth of the run further on.
            at = moments.randint(1, STARTING) if kills % 4 == 3 else STARTING + moments.randint(1, events // 4)
            status, said = server(arguments(folder, *OFTEN, "resume=auto"), signal_at=[at, signal.SIGKILL])
            assert status in (0, -signal.SIGKILL), said
            kills += status != 0
            resumed_within_an_epoch += (folder / "checkpoints").is_dir() and any(folder.glob("checkpoints/*/*.ckpt"))
        assert_same(folder, undisturbed)
        assert all("manifest.json does not list it" in event for event in read_metrics(folder)["events"])
        runs += 1
    assert resumed_within_an_epoch >= 5


def test_sigterm_within_an_epoch(
    arguments: Arguments, server: faulty.Server, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    status, said = server(arguments(folder), signal_batch=[STEPS + 11, signal.SIGTERM])
    assert status == 143, said
    assert said.splitlines()[-1] == f"Ended by SIGTERM; the same command goes on from what {folder} holds."
    checkpoint = folder / "checkpoints/block_001/last.ckpt"
    assert checkpoint.is_file()
    before = steps_logged(folder)
    assert before[-1] < STEPS - 1
    status, said = server(arguments(folder, f"resume={checkpoint}"))
    assert status == 0, said
    assert_same(folder, undisturbed)
    assert steps_logged(folder)[: len(before)] == before
    assert steps_logged(folder) == sorted(steps_logged(folder))
    assert steps_logged(folder)[-1] == STEPS - 1


def steps_logged(folder: Path) -> list[int]:
    with (folder / "logs/csv/block_001/metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["loss_step"]]


@pytest.mark.parametrize("at", [5, STARTING])
def test_sigterm_between_trainings(
    arguments: Arguments, server: faulty.Server, undisturbed: Path, tmp_path: Path, at: int
) -> None:
    folder = tmp_path / "run"
    status, said = server(arguments(folder), signal_at=[at, signal.SIGTERM])
    assert status == 143, said
    assert said.splitlines()[-1] == f"Ended by SIGTERM; the same command goes on from what {folder} holds."
    assert "Traceback" not in said
    assert server(arguments(folder))[0] == 0
    assert_same(folder, undisturbed)


def test_slurm_queues_the_job_again(
    arguments: Arguments, server: faulty.Server, undisturbed: Path, tmp_path: Path
) -> None:
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.touch(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "quantize", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{key}": value for key, value in slurm.items()}
    environment["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    folder = tmp_path / "run"
    scontrol.write_text("#!/bin/sh\nexit 1\n")  # as where the job was submitted with --no-requeue
    status, said = server(arguments(folder), signal_batch=[2, signal.SIGUSR1], environment=environment)
    assert status == 143, said
    assert "SLURM job 7 could not be queued again" in said
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    status, said = server(arguments(folder), signal_batch=[3, signal.SIGUSR1], environment=environment)
    assert status == 143, said
    assert "Ended by SIGUSR1; SLURM job 7 is queued again, and the same command goes on" in said
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert server(arguments(folder), environment=environment)[0] == 0
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("at", [10, 150, 400])
def test_a_full_disk(arguments: Arguments, server: faulty.Server, undisturbed: Path, tmp_path: Path, at: int) -> None:
    folder = tmp_path / "run"
    status, said = server(arguments(folder, *OFTEN), full_at=at)
    assert status == 75, said
    assert said.splitlines()[-1].startswith(f"No space is left for {folder}")
    assert said.splitlines()[-1].endswith(f"free some, then the same command goes on from what {folder} holds.")
    assert "Traceback" not in said
    assert server(arguments(folder, *OFTEN))[0] == 0
    assert_same(folder, undisturbed)


def test_a_real_full_disk(arguments: Arguments, server: faulty.Server, undisturbed: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "slimplus-test", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        status, said = server(arguments(mounted / "run", *OFTEN))
        assert status == 75, said
        assert "No space is left for" in said
        subprocess.run(["mount", "-o", "remount,size=100m", str(mounted)], check=True)
        assert server(arguments(mounted / "run", *OFTEN))[0] == 0
        assert_same(mounted / "run", undisturbed)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_damaged_checkpoint_is_named_and_the_block_begins_anew(
    arguments: Arguments, server: faulty.Server, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert server(arguments(folder), signal_batch=[6, signal.SIGTERM])[0] == 143
    checkpoint = folder / "checkpoints/block_000/last.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    status, said = server(arguments(folder, f"resume={checkpoint}"))
    assert status == 2
    assert said == f"resume: {checkpoint} differs from its checksum; give that of this run_dir, or resume=auto\n"
    foreign = Path(shutil.copytree(undisturbed, tmp_path / "other")) / "metrics.json"
    status, said = server(arguments(folder, f"resume={foreign}"))
    assert status == 2
    assert f"{foreign} is not the checkpoint of the training in progress ({folder} holds {checkpoint})" in said
    status, said = server(arguments(folder))
    assert status == 0, said
    assert f"{checkpoint} differs from its checksum; it is made again" in said
    assert_same(folder, undisturbed)


def blocks(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder)["blocks"]


def test_a_bad_step_is_skipped(arguments: Arguments, server: faulty.Server, undisturbed: Path, tmp_path: Path) -> None:
    status, said = server(arguments(tmp_path / "run"), nan_steps=[3], explode_step=STEPS + 12)
    assert status == 0, said
    assert [block["skipped_steps"] for block in blocks(tmp_path / "run")] == [1, 1]
    for ours, theirs in zip(blocks(tmp_path / "run"), blocks(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)


def test_a_diverging_training_begins_anew_and_is_then_given_up(
    arguments: Arguments, server: faulty.Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # Killed after the first divergence: the second start must remember it.
    status, said = server(arguments(folder), nan_steps=[1, 2, 3, 4, 5], signal_batch=[8, signal.SIGTERM])
    assert status == 143, said
    anew = "the gradient was not finite or exploded in 5 steps; training started over at a tenth of the learning rate"
    kept = "the gradient was not finite or exploded in 5 steps; the calibrated quantizers are kept"
    assert f"block_000: {anew}" in said
    status, said = server(arguments(folder), nan_steps=[1, 2, 3, 4, 5])
    assert status == 0, said
    first, second = blocks(folder)
    assert (first["events"], first["loss"]) == ([anew, kept], None)
    assert second["events"] == []
    assert second["loss"] < second["calibrated_loss"]
    summary = (folder / "summary.txt").read_text()
    assert f"block 0{' ' * summary.index('slimllm_plus')}"[:10].rstrip() in summary
    assert kept in summary


def test_out_of_memory(arguments: Arguments, server: faulty.Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, said = server(arguments(folder, "training.batch_size=4"), largest_batch=2)
    assert status == 0, said
    event = "out of device memory; 2 windows at a time instead of 4"
    assert f"block_000: {event}" in said
    assert [block["events"] for block in blocks(folder)] == [[event], [event]]
    whole = tmp_path / "whole"
    assert server(arguments(whole, "training.batch_size=4"))[0] == 0
    for ours, theirs in zip(blocks(folder), blocks(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3), "another step than that of the whole batch"
    status, said = server(arguments(tmp_path / "none"), largest_batch=0)
    assert status == 2
    assert said.splitlines()[-1].startswith("out of device memory while training on one window; give trainer")


def test_a_training_that_made_it_worse(arguments: Arguments, server: faulty.Server, tmp_path: Path) -> None:
    trained, untrained = tmp_path / "run", tmp_path / "untrained"
    status, said = server(arguments(trained), worsen=True)
    assert status == 0, said
    kept = "training ended above the calibrated loss; the calibrated quantizers are kept"
    for block in blocks(trained):
        slower, last = block["events"]
        assert slower.endswith("; training started over at a tenth of the learning rate")
        assert last == kept
    assert server(arguments(untrained, "quantization.method=slimllm"))[0] == 0
    name = "packed/model.safetensors"
    assert (trained / name).read_bytes() == (untrained / name).read_bytes()


def test_a_singular_hessian(arguments: Arguments, server: faulty.Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    method = ("quantization.method=gptq", "quantization.percdamp=1e-8")
    status, said = server(arguments(folder, *method), singular=160)
    assert status == 0, said
    event = "the Hessian of mlp.down_proj was singular; damping was raised to 0.01"
    assert all(event in block["events"] for block in blocks(folder))
    assert blocks(folder)[0]["percdamp"]["mlp.down_proj"] == 0.01
    assert event in (folder / "summary.txt").read_text()


@pytest.mark.parametrize(("allocation", "where"), [("slimllm", "block_000"), ("model", "sensitivity")])
def test_a_hessian_beyond_repair(
    arguments: Arguments, server: faulty.Server, tmp_path: Path, allocation: str, where: str
) -> None:
    key = f"quantization.allocation={allocation}"
    status, said = server(arguments(tmp_path / "run", key), singular=160, overflow=True)
    assert status == 2
    assert said.splitlines()[-1].startswith(
        f"{where}: the Hessian holds NaN or infinity: the block's inputs overflowed"
    )
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("parametrization", ["rounding", "weights"])
def test_kills_with_every_stage_change_no_byte(
    arguments: Arguments, server: faulty.Server, tmp_path: Path, parametrization: str
) -> None:
    """Sensitivity, trained rounding or weights, and training end to end, killed four times or more."""
    qat = ("quantization.method=qat", f"training.parametrization={parametrization}", "quantization.allocation=model")
    keys = (*OFTEN, *qat, "end_to_end.epochs=4", "end_to_end.batch_size=2")
    status, said = server(arguments(tmp_path / "undisturbed", *keys), count=str(tmp_path / "events"))
    assert status == 0, said
    events, kills, within = int((tmp_path / "events").read_text()), 0, 0
    folder, status = tmp_path / "run", 1
    for at in (STARTING + events // 2, *[STARTING + events // 8] * 3, None):
        signals = {} if at is None else {"signal_at": [at, signal.SIGKILL]}
        status, said = server(arguments(folder, *keys), **signals)
        kills += status == -signal.SIGKILL
        within += (folder / "checkpoints/end_to_end/last.ckpt").exists()
    assert status == 0, said
    assert kills >= 3
    assert within >= 1
    assert_same(folder, tmp_path / "undisturbed")
    assert read_metrics(folder)["end_to_end"] == read_metrics(tmp_path / "undisturbed")["end_to_end"]
