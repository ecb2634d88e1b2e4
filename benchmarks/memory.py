"""Main memory of the first blocks of a run on a checkpoint of LLaMA-7B's shapes with random weights.

    OMP_NUM_THREADS=2 python benchmarks/memory.py [--blocks 32] [--run 3] [--folder DIR]

Writes the checkpoint shard by shard into a temporary folder (13.5 GB, removed at the end), begins a run of GPTQ in a
new process, and ends it once the first blocks are finished. Anonymous memory is what no file holds, sampled a hundred
times a second. Writes benchmarks/results/memory.json with the machine, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from slimplus.models.loading import build_on_meta
from slimplus.pipeline.run import run
from slimplus.recipe.parsing import load_recipe
from slimplus.run_dir.directory import RunDirectory
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine, peak_resident_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
STATUS = Path("/proc/self/status")
SECONDS = 0.01  # between two samples
WINDOWS, LENGTH = 16, 512


class Finished(Exception):  # noqa: N818, no error
    """Signal that enough blocks are finished."""


def main() -> None:
    """Parse the arguments, measure, write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=32, help="transformer blocks (LLaMA-7B has 32)")
    parser.add_argument("--run", type=int, default=3, help="blocks to quantize")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size; other sizes follow from it")
    parser.add_argument("--folder", type=Path, help="folder for the temporary folder")
    parser.add_argument("--output", type=Path, default=RESULT, help="the JSON to write")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model:
        sys.stdout.write(json.dumps(measure(arguments.model, arguments.run)) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = Path(folder) / "model"
        size = write_model(model, arguments.blocks, arguments.hidden)
        command = [sys.executable, __file__, "--model", str(model), "--run", str(arguments.run)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    machine = describe_machine() | {"threads": torch.get_num_threads()}
    shapes = {"blocks": arguments.blocks, "hidden_size": arguments.hidden, "model_bytes": size}
    data = {"blocks_run": arguments.run, "windows": WINDOWS, "sequence_length": LENGTH}
    write_atomic(arguments.output, json.dumps({**shapes, **data, "machine": machine, **figures}, indent=2) + "\n")
    sys.stdout.write(arguments.output.read_text())


def write_model(folder: Path, blocks: int, hidden: int) -> int:
    """Write a model of random bfloat16 weights, a shard for each block, and return the bytes of its weights."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(["</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11008 // 4096,
        num_hidden_layers=blocks,
        num_attention_heads=max(hidden // 128, 1),
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in build_on_meta(config).named_parameters():
        number = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(f"block_{number[1]}.safetensors" if number else "outside.safetensors", {})[name] = (
            parameter.shape
        )
    torch.manual_seed(0)
    total, weight_map, drawn = 0, dict[str, str](), dict[torch.Size, Tensor]()
    for file, shapes in shards.items():
        numbered = enumerate(shapes.items(), start=len(weight_map))
        tensors = {name: random_weights(shape, number, drawn) for number, (name, shape) in numbered}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_weights(shape: torch.Size, number: int, drawn: dict[torch.Size, Tensor]) -> Tensor:
    """Return random weights, those of an earlier tensor of this shape moved around; norms have gains of one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    if shape not in drawn:
        drawn[shape] = torch.empty(shape).normal_(std=0.02).bfloat16()
    return drawn[shape].roll(number, 0)


def measure(model: Path, blocks: int) -> dict[str, Any]:
    """Run the first blocks in this process, and return its peaks of memory."""
    text = model.parent / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)))
    recipe = load_recipe(
        [
            "recipe=llama7b_2bit",
            *(f"model.path={model}", "model.dtype=auto", f"run_dir={model.parent / 'run'}", "trainer.accelerator=cpu"),
            *(f"data.calibration.path={text}", f"data.samples={WINDOWS}", f"data.sequence_length={LENGTH}"),
            *(f"data.evaluation.path={text}", "data.evaluation.windows=1", "data.evaluation.sequence_length=16"),
            *("quantization.method=gptq", "training.epochs=1"),
        ]
    )
    save, finished = RunDirectory.save_block, list[float]()

    def count(directory: RunDirectory, index: int, *arguments: Any) -> None:
        save(directory, index, *arguments)
        finished.append(time.perf_counter())
        if len(finished) == blocks:
            raise Finished

    RunDirectory.save_block = count  # type: ignore[method-assign, assignment]
    ended, peaks = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(SECONDS):
            peaks[0] = max(peaks[0], *anonymous())

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        run(recipe)
    except Finished:
        pass
    finally:
        ended.set()
        watcher.join()
    resident = peak_resident_bytes()
    return {"anonymous_bytes": peaks[0], "resident_bytes": resident, "seconds": time.perf_counter() - start}


def anonymous() -> Iterator[int]:
    """Yield the bytes of this process that no file holds."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            yield int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
