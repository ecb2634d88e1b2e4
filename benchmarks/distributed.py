"""Weak scaling of calibration and block reconstruction over processes: ddp and ZeRO 1, 2 and 3.

    python benchmarks/distributed.py [recipe=smollm2_135m_2bit] [key=value ...] [--processes 1 2] [--steps 10]

Quantizes and trains the model's first block, once for every strategy and number of processes, each time in new
processes. Every process takes one window a step, however many processes there are, and on a CPU one thread unless
OMP_NUM_THREADS says otherwise. Writes benchmarks/results/distributed.json with the machine, the versions and the
commit, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from slimplus.blockwise.calibrate import quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.blockwise.swap import fake_quantized_block
from slimplus.distributed.preemption import Preemption
from slimplus.pipeline.prepare import prepare, start
from slimplus.recipe.parsing import load_recipe
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.fit import Fit
from slimplus.training.reconstruction import BlockReconstruction
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine, resident_bytes

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipe=smollm2_135m_2bit"
METHOD = ("quantization.method=slimllm_plus", "quantization.allocation=slimllm", "training.learning_rate=2.0e-2")
STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
WARM_UP = 3  # steps that are not timed


def main() -> None:
    """Parse the arguments, measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=10, help="timed training steps")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/distributed.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # given to the processes of a measurement
    arguments, overrides = parser.parse_known_args()
    if arguments.measure:
        measure(overrides, arguments.measure)
        return
    if not any(override.startswith("recipe=") for override in overrides):
        overrides = [RECIPE, *METHOD, *overrides]
    rows = [
        run(strategy, processes, arguments.steps, overrides)
        for strategy in STRATEGIES
        for processes in arguments.processes
    ]
    result = {"settings": overrides, "steps": arguments.steps, "machine": describe_machine(), "rows": rows}
    write_atomic(arguments.output, json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(rows) + "\n")


def run(strategy: str, processes: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Start the processes of one measurement, wait for them, and return the row of the result."""
    keys = measured_keys(strategy, processes, steps, overrides)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, "--measure", f"{folder}/row", *keys, f"run_dir={folder}/run"]
        subprocess.run(command, check=True, cwd=ROOT)
        ranks = [json.loads(Path(folder, f"row.{rank}").read_text()) for rank in range(processes)]
    return {"strategy": strategy, "processes": processes, "ranks": ranks}


def measured_keys(strategy: str, processes: int, steps: int, overrides: list[str]) -> list[str]:
    """Return the recipe of one measurement, in which every process takes one window a step."""
    return [
        *overrides,
        *("quantization.method=slimllm_plus", f"trainer.strategy={strategy}", f"trainer.devices={processes}"),
        *("training.epochs=1", f"training.batch_size={processes}", "training.accumulate_grad_batches=1"),
        *(f"data.samples={processes * (steps + WARM_UP)}", f"data.evaluation.windows={processes}"),
        "end_to_end.epochs=0",
    ]


class TimedReconstruction(BlockReconstruction):
    """Block reconstruction that notes the time and the memory at the end of each step.

    Attributes:
        ends: seconds on the clock `time.perf_counter` at which each step ended.
        resident: bytes of resident memory at the end of each step.
    """

    def on_train_start(self) -> None:
        """Start with empty lists."""
        self.ends: list[float] = []
        self.resident: list[int] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Note the time and the memory, once the device has finished the step."""
        super().on_train_batch_end(*arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())
        self.resident.append(resident_bytes() or 0)

    @property
    def seconds_step(self) -> float:
        """Mean seconds of a step after the warm-up."""
        times = self.ends[WARM_UP - 1 :]
        return (times[-1] - times[0]) / (len(times) - 1)


def measure(keys: list[str], file: Path) -> None:
    """Quantize and train the first block in this process, and write its seconds and memory to `file.RANK`."""
    recipe, preemption = load_recipe(keys), Preemption()
    job = prepare(recipe, start(recipe), preemption)
    model, runner = job.model, job.runner
    inputs = model.block_inputs(job.shard(job.calibration.tokens))
    original, arguments = runner.load(model.blocks[0]), inputs.arguments[0]
    targets = runner.run(original, inputs.hidden, arguments)
    data = BlockData(original, inputs.hidden, arguments, runner, job.ranks)
    job.fabric.barrier()
    begin = time.perf_counter()
    result = quantize_block(data, job.settings)
    job.fabric.barrier()
    calibration = time.perf_counter() - begin
    block = fake_quantized_block(original, result, job.quantizer.quantizer)
    module = TimedReconstruction(block, arguments, job.quantizer.reconstruction, runner.precision)
    checkpoints = TrainingCheckpoints(job.run.root / "checkpoints", job.run.manifest, parent_hash="")
    if runner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runner.device)
    fit = (checkpoints, job.fabric, job.quantizer.fit, preemption)
    Fit(module, (inputs.hidden, targets), "block", *fit)()
    row = {
        "seconds_calibration": calibration,
        "seconds_step": module.seconds_step,
        "memory_bytes": max(module.resident),
    }
    if runner.device.type == "cuda":
        row["device_memory_bytes"] = torch.cuda.max_memory_allocated(runner.device)
    Path(f"{file}.{job.fabric.global_rank}").write_text(json.dumps(row))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| strategy | processes | samples/s | of linear scaling | calibration | memory a rank | GPU memory a rank |",
        "|---|---|---|---|---|---|---|",
    ]
    alone: dict[str, float] = {}
    for row in rows:
        step = max(rank["seconds_step"] for rank in row["ranks"])
        rate = row["processes"] / step
        first = alone.setdefault(row["strategy"], rate / row["processes"])
        memory, device = (
            max(rank.get(key, 0) for rank in row["ranks"]) / 1e9 for key in ("memory_bytes", "device_memory_bytes")
        )
        lines.append(
            f"| `{row['strategy']}` | {row['processes']} | {rate:.2f} | {rate / row['processes'] / first:.0%} | "
            f"{max(rank['seconds_calibration'] for rank in row['ranks']):.1f} s | {memory:.2f} GB | "
            f"{f'{device:.2f} GB' if device else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
