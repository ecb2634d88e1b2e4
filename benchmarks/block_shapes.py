"""Block-wise training with learned rounding at the shapes of large models, extrapolated to all their blocks.

    python benchmarks/block_shapes.py [--shapes llama_7b llama2_70b] [--samples 128] [--epochs 4]

One block with random weights is calibrated on random tokens and trained for some steps. The time of a step is
multiplied by the number of steps, and the time of a block by the number of blocks, which gives hours for a whole model
on one device. The result also names hours that others report for a 7B model on one A100: OmniQuant (arXiv 2308.13137,
20 epochs) and EfficientQAT (arXiv 2407.11062, block-wise phase). Writes benchmarks/results/block_shapes.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from distributed import WARM_UP, TimedReconstruction
from transformers import LlamaConfig, LlamaForCausalLM

from slimplus.blockwise.calibrate import quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.blockwise.quantizer import QuantizerConfig
from slimplus.blockwise.swap import fake_quantized_block
from slimplus.distributed.preemption import Preemption
from slimplus.distributed.strategies import launch
from slimplus.models.precision import resolve_precision
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.quantization.linear import QuantizationConfig
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.fit import Fit, FitConfig
from slimplus.training.optimizers import RateConfig
from slimplus.training.reconstruction import ReconstructionConfig
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine, peak_resident_bytes
from slimplus.utils.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "llama_7b": (32, {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}),
    "llama2_70b": (
        80,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    ),
    "tiny": (2, {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}),
}
"""Name → number of blocks, and the sizes of a block as `LlamaConfig` takes them."""

REPORTED_HOURS = {"OmniQuant": 5.0, "EfficientQAT": 3.3}


def main() -> None:
    """Parse the arguments, measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama_7b", "llama2_70b"])
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the windows, for the extrapolation")
    parser.add_argument("--steps", type=int, default=20, help="timed training steps")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/block_shapes.json")
    given = parser.parse_args()
    settings = {"samples": given.samples, "sequence_length": given.sequence_length, "epochs": given.epochs}
    rows: list[dict[str, Any]] = []
    result = {"settings": settings, "machine": describe_machine(), "reported_hours": REPORTED_HOURS, "rows": rows}
    for shape in given.shapes:
        rows.append(measure(shape, given))
        write_atomic(given.output, json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(rows) + "\n")


@torch.no_grad()
def measure(shape: str, given: argparse.Namespace) -> dict[str, Any]:
    """Quantize one block of a shape, train it for some steps, and return the row of the result."""
    blocks, sizes = SHAPES[shape]
    fabric = launch("auto", 1, 1, "auto")
    runner = BlockRunner(fabric.device, resolve_precision("auto", fabric.device))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=1024, **sizes)).bfloat16()
    streamed = StreamedModel(model, runner)
    inputs = streamed.block_inputs(torch.randint(1024, (given.samples, given.sequence_length)))
    original, arguments = runner.load(streamed.blocks[0]), inputs.arguments[0]
    start = time.perf_counter()
    targets = runner.run(original, inputs.hidden, arguments)
    outputs, start = time.perf_counter() - start, time.perf_counter()
    config = QuantizationConfig("qat", 2, given.group_size, 0.01, "uniform")
    result = quantize_block(BlockData(original, inputs.hidden, arguments, runner), config)
    calibration = time.perf_counter() - start
    module = TimedReconstruction(
        fake_quantized_block(original, result, QuantizerConfig("rounding", {})),
        arguments,
        ReconstructionConfig(1, 1, optimizer="sign_sgd", grid=RateConfig(), per_weight=RateConfig()),
        runner.precision,
    )
    count = given.steps + WARM_UP
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        where = FitConfig(1, 1, "auto", "none", Path(folder, "logs"), seed=0, checkpoint_seconds=3600)
        checkpoints = TrainingCheckpoints(Path(folder, "checkpoints"), Manifest(Path(folder)), parent_hash="")
        data = (inputs.hidden[:count], targets[:count])
        Fit(module, data, shape, checkpoints, fabric, where, Preemption())()
    step = module.seconds_step
    # The block runs over all windows for the targets, for the loss before training, and for the next block's inputs.
    block = 3 * outputs + calibration + given.epochs * given.samples * step
    row = {
        "shape": shape,
        "seconds_outputs": outputs,
        "seconds_calibration": calibration,
        "seconds_step": step,
        "seconds_block": block,
        "hours": block * blocks / 3600,
        "memory_bytes": peak_resident_bytes(),
    }
    if fabric.device.type == "cuda":
        row |= {
            "device": torch.cuda.get_device_name(fabric.device),
            "device_memory_bytes": torch.cuda.max_memory_allocated(fabric.device),
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| shape | calibration | step | block | hours | memory | GPU memory |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        memory, device = (row.get(key, 0) / 1e9 for key in ("memory_bytes", "device_memory_bytes"))
        lines.append(
            f"| {row['shape']} | {row['seconds_calibration']:.1f} s | {row['seconds_step'] * 1e3:.0f} ms | "
            f"{row['seconds_block']:.0f} s | {row['hours']:.2f} | {memory:.1f} GB | {device:.1f} GB |"
        )
    reported = ", ".join(f"{name} {hours} h" for name, hours in REPORTED_HOURS.items())
    return "\n".join([*lines, "", f"Reported by others for 7B on one A100: {reported}."])


if __name__ == "__main__":
    main()
