"""Runs on the GPU, each in a process of its own: a whole calibration, block steps at large shapes, a killed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import Visit
from benchmarks.gpu.rows import ROOT, Rows

CALIBRATION = (
    *("recipe=smollm2_135m_2bit_best", "data.calibration=self", "data.samples=960"),
    *("training.epochs=1", "end_to_end.epochs=1"),
)
"""Ten times the recipe's tokens, which the model writes itself, each read once."""
KILLED = ("recipe=smollm2_135m_2bit", "trainer.strategy=deepspeed_stage_2")
SHAPES = {"llama_7b": (16, 10), "llama2_70b": (16, 6)}
"""Shape → windows and timed steps."""
REHEARSED = (
    *("model.gguf_file=null", "model.dtype=auto", "trainer.accelerator=cpu", "trainer.precision=32-true"),
    *("data.calibration=offline", "data.samples=4", "data.sequence_length=32"),
    *("data.evaluation.sequence_length=32", "data.evaluation.windows=2", "evaluation.prompts=[]"),
    *("quantization.method=slimllm_plus", "quantization.allocation=null", "quantization.group_size=16"),
    *("training.learning_rate=2.0e-2", "training.epochs=1", "end_to_end.epochs=0"),
)
"""Keys that make any run of a tiny model last seconds."""


def calibration(visit: Visit, rows: Rows) -> None:
    """Quantize SmolLM2 with ten times the tokens, end to end included; a later call goes on where one stopped."""
    rows.measure({"what": "calibration of SmolLM2-135M"}, partial(_calibration, visit, rows.deadline))


def blocks(visit: Visit, rows: Rows) -> None:
    """Measure training steps of one block at the shapes of large models."""
    for shape, (windows, steps) in {"tiny": (8, 2)}.items() if visit.rehearsal else SHAPES.items():
        rows.measure({"shape": shape}, partial(_block_steps, visit, shape, windows, steps, rows.deadline))


def deepspeed(visit: Visit, rows: Rows) -> None:
    """Kill a run with ZeRO 2, go on with it, and compare it with one that nothing happened to."""
    rows.measure({"what": "deepspeed_stage_2 killed and resumed"}, partial(_killed, visit, rows.deadline))


def _calibration(visit: Visit, deadline: float) -> dict[str, Any]:
    folder = _work(visit) / "calibration"
    train([*CALIBRATION, *_rehearsed(visit), f"run_dir={folder}"], deadline)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    wanted = ("perplexity", "average_bits", "bits_per_weight", "seconds", "peak_device_memory_bytes", "end_to_end")
    return {"keys": list(CALIBRATION), **{key: metrics[key] for key in wanted if key in metrics}}


def _block_steps(visit: Visit, shape: str, windows: int, steps: int, deadline: float) -> dict[str, Any]:
    file = _work(visit) / f"block_{shape}.json"
    length = 32 if visit.rehearsal else 2048
    settings = ["--samples", windows, "--steps", steps, "--sequence-length", length, "--epochs", 1, "--output", file]
    grid = ["--group-size", 32] if visit.rehearsal else []
    command = [ROOT / "benchmarks/block_shapes.py", "--shapes", shape, *settings, *grid]
    finish(start([str(part) for part in command]), deadline)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["rows"][0]
    return found | {"windows": windows, "sequence_length": length}


def _killed(visit: Visit, deadline: float) -> dict[str, Any]:
    folders = [_work(visit) / name for name in ("undisturbed", "killed")]
    keys = [*KILLED, *_rehearsed(visit)]
    train([*keys, f"run_dir={folders[0]}"], deadline)
    command = [str(ROOT / "train.py"), *keys, f"run_dir={folders[1]}"]
    process = start(command)
    while process.poll() is None and not (folders[1] / "blocks/block_000.safetensors").exists():
        time.sleep(0.02)
    interrupted = process.poll() is None
    if interrupted:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start(command), deadline)
    files = [(folder / "packed/model.safetensors").read_bytes() for folder in folders]
    if not interrupted or files[0] != files[1]:
        raise RuntimeError(f"killed: {interrupted}; the same bytes afterwards: {files[0] == files[1]}")
    return {"keys": list(KILLED), "same_bytes": True}


def train(keys: Sequence[str], deadline: float) -> None:
    """Run a recipe to its end.

    Raises:
        RuntimeError: if it fails, or is not at its end by the deadline; SIGTERM ends it then, and it can go on.
    """
    finish(start([str(ROOT / "train.py"), *keys]), deadline)


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a Python script in a process group of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], deadline: float) -> None:
    """Wait for a process, and end it at the deadline.

    Raises:
        RuntimeError: if it fails or had to be ended.
    """
    try:
        said, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        said, _ = process.communicate()
        raise RuntimeError(f"not done by the deadline; it can go on: {said[-500:]}") from None
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {said[-1500:]}")


def _work(visit: Visit) -> Path:
    """Return the folder of runs, which is no result."""
    folder = ROOT / "runs" / "gpu" / visit.folder.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _rehearsed(visit: Visit) -> list[str]:
    """Return the keys that make a rehearsal's runs short: they quantize a tiny random model."""
    if not visit.rehearsal:
        return []
    from tests.support.models import save_tiny_model

    folder = _work(visit) / "model"
    folder.mkdir(exist_ok=True)
    save_tiny_model(folder, "llama", 2, {})
    return [*REHEARSED, f"model.path={folder}"]
