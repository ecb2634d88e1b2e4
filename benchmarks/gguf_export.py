"""What llama.cpp makes of an exported checkpoint, beside what slimplus computes: benchmarks/results/gguf_export.json.

    python -m benchmarks.gguf_export PACKED_OR_RUN [--threads N] [--windows N] [--library TEXT]

1. The checkpoint is exported to a temporary GGUF file.
2. transformers and llama.cpp read it. On windows of the offline evaluation text, their predictions are compared with
   those of `slimplus.load` in float32: KL divergence over the whole vocabulary, perplexity, the same top token.
3. llama.cpp's tokenizer reads that text, and both continue prompts by the likeliest tokens.
4. Both are timed, on the same number of threads, slimplus in bfloat16.

llama.cpp comes through its Python bindings: `pip install llama-cpp-python==0.3.36` builds it, with CMake and a C++
compiler. LLAMA_CPP_LIB_PATH names a folder with a libllama that was built elsewhere. Speeds are worth something on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import slimplus
from slimplus.cli.main import main as command
from slimplus.data.text import load_text
from slimplus.evaluation.timed_model import timed_round
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine, package_version

RESULTS = Path(__file__).resolve().parent / "results" / "gguf_export.json"
LENGTH = 512  # tokens of a window
PROMPTS = ("The history of the city", "A function is", "The president of the United States said", "Once upon a time")
GREEDY, ROUNDS, PREFILL, DECODE = 32, 5, 256, 64
PROMPT = torch.randint(1000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
BINDINGS = "llama-cpp-python"


def predictions(model: Any, tokens: Tensor) -> Tensor:
    """Return the logarithmic probabilities after each token of a window `[tokens]`, `[tokens, vocabulary]`, float64."""
    if isinstance(model, torch.nn.Module):
        with torch.inference_mode():
            logits = model(tokens[None]).logits[0]
    else:
        model.reset()
        model.eval(tokens.tolist())
        logits = torch.from_numpy(model.scores[: len(tokens)])
    return logits.double().log_softmax(-1)


def greedy(llama: Any, tokens: list[int]) -> Iterator[int]:
    """Yield the likeliest tokens that llama.cpp writes after `tokens`, without end."""
    llama.reset()
    yield from llama.generate(tokens, temp=0.0)


def compare(models: Mapping[str, Any], windows: Iterable[Tensor]) -> dict[str, dict[str, float]]:
    """Return the figures of each model on the windows; the first model is the one that others are compared with."""
    sums: dict[str, dict[str, list[Tensor]]] = {name: {"loss": [], "kl": [], "top": []} for name in models}
    for tokens in windows:
        reference = None
        for name, model in models.items():
            found = predictions(model, tokens)
            reference = found if reference is None else reference
            sums[name]["loss"].append(-found[:-1].gather(-1, tokens[1:, None]))
            sums[name]["kl"].append((reference.exp() * (reference - found)).sum(-1))
            sums[name]["top"].append((reference.argmax(-1) == found.argmax(-1)).double())
    first = next(iter(sums))
    result = {}
    for name, lists in sums.items():
        means = {key: float(torch.cat(parts).mean()) for key, parts in lists.items()}
        result[name] = {"perplexity": float(np.exp(means["loss"]))}
        if name != first:
            largest = float(torch.cat(lists["kl"]).max())
            result[name] |= {"kl_mean": means["kl"], "kl_max": largest, "top_token_agreement": means["top"]}
            result[name]["perplexity_ratio"] = result[name]["perplexity"] / result[first]["perplexity"]
    return result


def time_slimplus(packed: Path, threads: int) -> list[dict[str, float]]:
    """Return the seconds of rounds of reading a prompt and writing, in bfloat16."""
    torch.set_num_threads(threads)
    model = slimplus.load(packed, dtype=torch.bfloat16)
    return [timed_round(model, PROMPT, DECODE, static_cache=False) for _ in range(ROUNDS + 1)]


def time_llama(file: Path, threads: int) -> list[dict[str, float]]:
    """Return the seconds of rounds of reading a prompt and writing in llama.cpp."""
    llama, rounds = load_llama(file, threads), []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        times = [time.perf_counter() for _ in islice(greedy(llama, PROMPT[0].tolist()), DECODE)]
        rounds.append({"prefill_seconds": times[0] - start, "decode_seconds": times[-1] - times[0]})
    return rounds


def speed(timed: Callable[[Path, int], list[dict[str, float]]], path: Path, threads: int) -> dict[str, float]:
    """Return tokens/s of the median round, measured in a process of its own.

    Both engines set the processor up for products of matrices (AMX), and do not expect another to do so as well.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        _, *rounds = process.submit(timed, path, threads).result()
    return {
        "prefill_tokens_per_second": PREFILL / median(each["prefill_seconds"] for each in rounds),
        "decode_tokens_per_second": (DECODE - 1) / median(each["decode_seconds"] for each in rounds),
    }


def load_llama(file: Path, threads: int, **settings: Any) -> Any:
    """Return llama.cpp with a GGUF file."""
    from llama_cpp import Llama  # an optional library

    return Llama(str(file), n_ctx=LENGTH, n_threads=threads, n_threads_batch=threads, verbose=False, **settings)


def measure(packed: Path, file: Path, threads: int, count: int) -> dict[str, Any]:
    """Return what llama.cpp and transformers compute with a GGUF file, beside the checkpoint that it was made from."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    text = load_text("offline", "evaluation")[: 8 * LENGTH * (count + 1)]
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    windows = tokens[: LENGTH * count].view(count, LENGTH)
    model: Any = slimplus.load(packed, dtype=torch.float32, keep_dense=True)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    other = load_llama(file, threads, logits_all=True)
    figures: dict[str, Any] = {"file_bytes": file.stat().st_size, "windows": [count, LENGTH]}
    figures["same_tokens_of_text"] = tokens.tolist() == other.tokenize(text.encode(), add_bos=False, special=True)
    figures["models"] = compare({"slimplus": model, "transformers": read, "llama.cpp": other}, windows)
    del read
    figures["greedy_tokens_equal"] = {}
    for prompt in PROMPTS:
        given = tokenizer(prompt)["input_ids"]
        settings = {"max_new_tokens": GREEDY, "min_new_tokens": GREEDY, "do_sample": False}
        ours = model.generate(torch.tensor([given]), **settings)[0, len(given) :].tolist()
        theirs = list(islice(greedy(other, given), GREEDY))
        equal = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), GREEDY)
        figures["greedy_tokens_equal"][prompt] = equal
    return figures


def main() -> None:
    """Parse the arguments, export, measure, and put the figures into the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("path", type=Path, help="run directory, or folder of a packed checkpoint")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {LENGTH} tokens")
    parser.add_argument(
        "--library", default="that of the bindings", help="what LLAMA_CPP_LIB_PATH holds, for the results"
    )
    given = parser.parse_args()
    packed = given.path / "packed" if (given.path / "packed").is_dir() else given.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        if command(["export", str(packed), "--to", "gguf", str(file)]):
            raise SystemExit(1)
        versions = {package: package_version(package) for package in ("gguf", BINDINGS)}
        result = {"machine": describe_machine() | versions, "llama.cpp": given.library, "checkpoint": given.path.name}
        result |= measure(packed, file, given.threads, given.windows)
        write_atomic(RESULTS, json.dumps(result, indent=2) + "\n")
        result |= {"threads": given.threads, "load_average_before": os.getloadavg()[0]}
        result["speed"] = {
            "slimplus": speed(time_slimplus, packed, given.threads),
            "llama.cpp": speed(time_llama, file, given.threads),
        }
    write_atomic(RESULTS, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
