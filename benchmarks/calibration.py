"""Steps of block training side by side: slimplus, AutoRound, a plain PyTorch loop and the dense block.

    python -m pip install --no-deps auto-round   # its other requirements come with slimplus
    python -m benchmarks.calibration [--shapes smollm2_135m wide_2048 llama_7b] [--precisions 32-true bf16-mixed]

Each contender trains the rounding of one block of random weights at 2 bits, in a process of its own; the rounds take
turns, so that all meet the same machine. A step is what lies between two steps of the optimizer, and the median of a
round's steps counts; the dense block runs forward and backward, gradients of its weights included, and takes no step.
Ratios are medians over the rounds, each to the dense block of its round. Memory is the peak of the process.
Writes benchmarks/results/calibration.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimplus.blockwise.calibrate import quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.blockwise.quantizer import QuantizerConfig
from slimplus.blockwise.swap import fake_quantized_block
from slimplus.distributed.preemption import Preemption
from slimplus.distributed.strategies import launch
from slimplus.models.block_arguments import call_block
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.nn.fake_quantized import LARGEST_OFFSET
from slimplus.quantization.linear import QuantizationConfig
from slimplus.training.checkpoints import TrainingCheckpoints
from slimplus.training.compiled import CompiledCall
from slimplus.training.fit import Fit, FitConfig
from slimplus.training.optimizers import SignSGD
from slimplus.training.reconstruction import BlockReconstruction, ReconstructionConfig
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine, peak_resident_bytes
from slimplus.utils.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2_135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "wide_2048": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama_7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
}
"""Name → the sizes of a block as `LlamaConfig` takes them."""

CONTENDERS = ("dense", "slimplus", "slimplus_plain_loop", "autoround", "autoround_compiled")
GROUP_SIZE, BITS, VOCABULARY = 64, 2, 1024
WARM_UP = 3  # steps that are not timed: code is compiled in the first
STEPS_AN_EPOCH = 8


def main() -> None:
    """Parse the arguments, measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2_135m", "wide_2048", "llama_7b"])
    parser.add_argument("--precisions", nargs="+", choices=("32-true", "bf16-mixed"), default=["32-true", "bf16-mixed"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--windows", type=int, default=8, help="windows of a step")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/calibration.json")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # given to the process of a measurement
    given = parser.parse_args()
    if given.measure:
        contender, shape, precision, file = given.measure
        Path(file).write_text(json.dumps(measure(contender, shape, precision, given)))
        return
    rows: list[dict[str, Any]] = []
    settings = {"windows": given.windows, "sequence_length": given.sequence_length, "steps": given.steps}
    result = {"settings": settings, "machine": describe_machine() | {"threads": torch.get_num_threads()}, "rows": rows}
    for shape in given.shapes:
        for precision in given.precisions:
            rows += compare(shape, precision, given)
            write_atomic(given.output, json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(rows) + "\n")


def compare(shape: str, precision: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the contenders in turns, and return a row for each."""
    rounds = [{name: start(name, shape, precision) for name in given.contenders} for _ in range(given.rounds)]
    rows = []
    for name in given.contenders:
        seconds = [each[name]["seconds_step"] for each in rounds]
        row = {
            "shape": shape,
            "precision": precision,
            "contender": name,
            "seconds_step": statistics.median(seconds),
            "rounds": seconds,
            "memory_bytes": max(each[name]["memory_bytes"] for each in rounds),
        }
        if "dense" in given.contenders:
            row["over_dense"] = statistics.median(
                each[name]["seconds_step"] / each["dense"]["seconds_step"] for each in rounds
            )
        rows.append(row)
    return rows


def start(contender: str, shape: str, precision: str) -> dict[str, Any]:
    """Measure one contender in a new process, with the arguments of this one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.json")
        command = [
            sys.executable,
            "-m",
            "benchmarks.calibration",
            *sys.argv[1:],
            "--measure",
            contender,
            shape,
            precision,
            str(file),
        ]
        subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def measure(contender: str, shape: str, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train a block in this process, and return the median seconds of a step and the peak of memory."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=VOCABULARY, **SHAPES[shape])).eval()
    tokens = torch.randint(VOCABULARY, (STEPS_AN_EPOCH * given.windows, given.sequence_length))
    ends: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    epochs = -(-(given.steps + WARM_UP) // STEPS_AN_EPOCH)
    if contender.startswith("autoround"):
        tune_autoround(model, tokens, epochs, precision, contender.endswith("compiled"))
    elif contender == "dense":
        train_dense(model, tokens[: given.windows], given.steps + WARM_UP, precision, ends)
    else:
        train_slimplus(model, tokens, epochs, precision, plain=contender == "slimplus_plain_loop")
    handle.remove()
    times = [end - begin for begin, end in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
    return {"seconds_step": statistics.median(times), "memory_bytes": peak_resident_bytes()}


def train_dense(model: LlamaForCausalLM, tokens: Tensor, steps: int, precision: str, ends: list[float]) -> None:
    """Run the block forward and backward, its weights in the dtype of the products, and note the ends of the steps."""
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    block = model.model.layers[0].to(dtype)
    hidden = model.model.embed_tokens(tokens).detach().to(dtype)
    position = model.model.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
    target = torch.randn_like(hidden)
    for _ in range(steps):
        torch.nn.functional.mse_loss(block(hidden, position_embeddings=position).float(), target.float()).backward()
        for parameter in block.parameters():
            parameter.grad = None
        ends.append(time.perf_counter())


def train_slimplus(model: LlamaForCausalLM, tokens: Tensor, epochs: int, precision: str, plain: bool) -> None:
    """Train the block as a run does, or in a loop of a few lines with operators that are not compiled."""
    fabric = launch("cpu", 1, 1, "auto")
    runner = BlockRunner(fabric.device, precision)
    with torch.no_grad():
        streamed = StreamedModel(model, runner)
        inputs = streamed.block_inputs(tokens)
        original, arguments = runner.load(streamed.blocks[0]), inputs.arguments[0]
        targets = runner.run(original, inputs.hidden, arguments)
        config = QuantizationConfig("rtn", BITS, GROUP_SIZE, 0.01, "uniform")
        result = quantize_block(BlockData(original, inputs.hidden, arguments, runner), config)
        block = fake_quantized_block(original, result, QuantizerConfig("rounding", {}))
    del model, streamed, original, result
    training = ReconstructionConfig(epochs, len(tokens) // STEPS_AN_EPOCH, optimizer="sign_sgd")
    call = call_block if plain else CompiledCall()
    module = BlockReconstruction(block, arguments, training, precision, call=call)
    if plain:
        plain_loop(module, inputs.hidden, targets)
        return
    with tempfile.TemporaryDirectory() as folder:
        where = FitConfig(1, 1, "auto", "none", Path(folder, "logs"), seed=0, checkpoint_seconds=3600)
        checkpoints = TrainingCheckpoints(Path(folder, "checkpoints"), Manifest(Path(folder)), parent_hash="")
        Fit(module, (inputs.hidden, targets), "block", checkpoints, fabric, where, Preemption())()


def plain_loop(module: BlockReconstruction, hidden: Tensor, targets: Tensor) -> None:
    """Train without Lightning."""
    config = module.config
    parameters = [parameter for kind in module.kinds() for parameter in kind.parameters]
    optimizer = SignSGD(parameters, lr=2 / (config.epochs * STEPS_AN_EPOCH), bound=LARGEST_OFFSET)
    for _ in range(config.epochs):
        for batch in zip(hidden.split(config.batch_size), targets.split(config.batch_size), strict=True):
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()


def tune_autoround(model: LlamaForCausalLM, tokens: Tensor, epochs: int, precision: str, compiled: bool) -> None:
    """Tune the block with AutoRound's defaults, with zero points."""
    from auto_round import AutoRound

    is_mixed = precision == "bf16-mixed"
    AutoRound(
        model.bfloat16() if is_mixed else model,
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, ""))),  # asked for, and not used
        bits=BITS,
        group_size=GROUP_SIZE,
        sym=False,
        dataset=[{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in tokens.split(1)],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        iters=epochs * STEPS_AN_EPOCH,
        batch_size=len(tokens) // STEPS_AN_EPOCH,
        amp=is_mixed,
        enable_torch_compile=compiled,
        device_map="cpu",
    ).quantize()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| shape | precision | | step | over dense | memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        over = f"{row['over_dense']:.2f}" if "over_dense" in row else ""
        lines.append(
            f"| {row['shape']} | {row['precision']} | {row['contender']} | {row['seconds_step'] * 1e3:,.0f} ms | "
            f"{over} | {row['memory_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
