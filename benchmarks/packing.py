"""Seconds to pack the linear layers of a LLaMA-7B, and to load the checkpoint in comparison with reading its bytes.

    OMP_NUM_THREADS=2 python benchmarks/packing.py [--blocks 32] [--folder DIR]

Packs the weights of one random block again for every block, writes the checkpoint into a temporary folder (2.3 GB,
removed at the end), and loads it in new processes: first with its pages dropped from the page cache, then with its
pages in it. Writes benchmarks/results/packing.json with the machine, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from slimplus.format.affine import QuantizedWeight, group_count, per_column
from slimplus.format.planes import count_bits, pack, unpack
from slimplus.hub.checkpoint import write_checkpoint
from slimplus.hub.transformers_quantizer import SlimplusConfig
from slimplus.models.loading import build_on_meta
from slimplus.nn import prepare_inference
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "packing.json"
GROUP_SIZE = 128
READ = 2**24  # bytes to read at a time


def main() -> None:
    """Parse the arguments, measure, write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=32, help="transformer blocks (LLaMA-7B has 32)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size; other sizes follow from it")
    parser.add_argument("--folder", type=Path, help="folder for the temporary folder, on the disk to measure")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON to write")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        sys.stdout.write(json.dumps(load_seconds(arguments.load)) + "\n")
        return
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11008 // 4096,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=max(arguments.hidden // 128, 1),
        dtype=torch.float16,
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoint = Path(folder) / "packed"
        figures = measure_packing(config, checkpoint)
        figures |= measure_loading(checkpoint)
    machine = describe_machine() | {"threads": torch.get_num_threads()}
    result = {"blocks": arguments.blocks, "hidden_size": arguments.hidden, "machine": machine, **figures}
    write_atomic(arguments.output, json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def measure_packing(config: LlamaConfig, folder: Path) -> dict[str, Any]:
    """Pack the linear layers of every block, write the checkpoint, and return sizes and seconds."""
    layers = {
        name: tuple(parameter.shape)
        for name, parameter in build_on_meta(config).named_parameters()
        if name.startswith("model.layers.") and parameter.dim() == 2
    }
    weights = {shape: random_weight(*shape) for shape in set(layers.values())}
    seconds = 0.0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal seconds
        for name, parameter in build_on_meta(config).named_parameters():
            if name in layers:
                start = time.perf_counter()
                packed = pack(weights[layers[name]])
                seconds += time.perf_counter() - start
                for key, tensor in packed.items():
                    yield f"{name.removesuffix('weight')}{key}", tensor
            else:
                yield name, torch.zeros(parameter.shape, dtype=torch.float16)

    modules = {name.removesuffix(".weight"): count_bits(weights[shape].bits) for name, shape in layers.items()}
    shapes = {name.removesuffix(".weight"): shape for name, shape in layers.items()}
    full_bytes = 2 * sum(parameter.numel() for parameter in build_on_meta(config).parameters())
    quantization = SlimplusConfig(2, GROUP_SIZE, modules, "slimllm", shapes, full_bytes)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    start = time.perf_counter()
    size = write_checkpoint(folder, tensors(), config, quantization, tokenizer, None, "")
    return {
        "weights": sum(rows * columns for rows, columns in layers.values()),
        "checkpoint_bytes": size,
        "pack_seconds": seconds,
        "pack_and_write_seconds": time.perf_counter() - start,
        "largest_layer": measure_layer(weights[max(weights)]),
    }


def measure_layer(weight: QuantizedWeight) -> dict[str, Any]:
    """Return the seconds to pack, unpack and dequantize one weight."""
    rows, columns = weight.integers.shape
    start = time.perf_counter()
    packed = pack(weight)
    packed_at = time.perf_counter()
    back = unpack(packed, rows, columns, weight.group_size)
    unpacked_at = time.perf_counter()
    back.dequantize()
    return {
        "shape": [rows, columns],
        "pack_seconds": packed_at - start,
        "unpack_seconds": unpacked_at - packed_at,
        "dequantize_seconds": time.perf_counter() - unpacked_at,
    }


def random_weight(rows: int, columns: int) -> QuantizedWeight:
    """Return a random weight of 2 bits on average, with an eighth of its groups at 1 bit and an eighth at 3."""
    groups = group_count(columns, GROUP_SIZE)
    bits = torch.full((groups,), 2, dtype=torch.int32)
    bits[: groups // 8], bits[groups - groups // 8 :] = 1, 3
    bits = bits[torch.randperm(groups)]
    levels = per_column(2**bits, GROUP_SIZE, columns).to(torch.uint8)
    integers = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).remainder_(levels)
    return QuantizedWeight(integers, torch.full((rows, groups), 0.01), torch.ones(rows, groups), bits, GROUP_SIZE)


def measure_loading(folder: Path) -> dict[str, Any]:
    """Return the seconds to read the files of a checkpoint and to load the model, from the disk and from memory."""
    files = sorted(folder.glob("*.safetensors"))
    figures: dict[str, Any] = {}
    for state in ("cold", "warm"):
        steps = {"read": lambda: read_seconds(files), "load": lambda: _load_in_a_process(folder)}
        for name, step in steps.items():
            if state == "cold":
                drop_from_cache(files)
            figures[f"{name}_{state}_seconds"] = step()
    return figures


def drop_from_cache(files: list[Path]) -> None:
    """Drop the pages of files from the kernel's page cache, once they are on the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_seconds(files: list[Path]) -> float:
    """Return the seconds to read every byte once."""
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(READ):
                pass
    return time.perf_counter() - start


def _load_in_a_process(folder: Path) -> dict[str, float]:
    """Return `load_seconds`, measured in a new process."""
    command = [sys.executable, __file__, "--load", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def load_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds to load the model, to touch every page in case it was only mapped, and to make it ready."""
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = time.perf_counter()
    for tensor in model.state_dict().values():
        tensor.flatten().view(torch.uint8)[::4096].sum()
    touched = time.perf_counter()
    for fused in prepare_inference(model):
        fused.prepare()
    return {"load": loaded - start, "touch": touched - loaded, "prepare": time.perf_counter() - touched}


if __name__ == "__main__":
    main()
