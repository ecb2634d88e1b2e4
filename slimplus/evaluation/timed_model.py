"""A model that is loaded and timed in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from slimplus.evaluation.decoding import GraphDecoder
from slimplus.evaluation.generation import find_device
from slimplus.evaluation.workload import Candidate, Workload
from slimplus.hub.checkpoint import load
from slimplus.models.loading import ModelSource
from slimplus.nn import PackedLinear
from slimplus.utils.machine import peak_resident_bytes, resident_bytes

NO_TOKEN = 2**31 - 1  # as the end of a sequence: none ends before it has all its tokens


class Stopwatch(BaseStreamer):
    """Streamer that notes when `generate` gives it the prompt, and each token after it.

    Attributes:
        times: seconds on the clock `time.perf_counter`, of the prompt and of each token.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time; the value lies on the CPU, so the device has computed it."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing, since nothing is held back."""


class TimedModel:
    """A loaded model that has run one round to warm up.

    Args:
        candidate: the model to load.
        workload: what a round is.

    Attributes:
        facts: path, device, threads, seconds to load, and bytes of the weights.

    Raises:
        InputError: if the model or the device does not exist.
    """

    def __init__(self, candidate: Candidate, workload: Workload) -> None:
        self.workload = workload
        self.device = find_device(workload.device)
        start = time.perf_counter()
        self.model = _load(candidate, workload.dtype, self.device).eval()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.facts: dict[str, Any] = {
            "path": candidate.path,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "threads": torch.get_num_threads(),
            "load_seconds": time.perf_counter() - start,
            "weight_bytes": _weight_bytes(self.model),
        }
        self.generate = GraphDecoder(self.model).generate if workload.graph else cast("Any", self.model).generate
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(vocabulary, (1, workload.prompt_tokens), generator=generator).to(self.device)
        self.round()

    def round(self) -> dict[str, float]:
        """Read the prompt and write the new tokens, see `timed_round`."""
        return timed_round(self.generate, self.prompt, self.workload.new_tokens, self.workload.static_cache)

    def memory(self) -> dict[str, int | None]:
        """Return the bytes that this process takes, libraries included, and PyTorch's peak allocation on a GPU."""
        resident = resident_bytes()
        peak = peak_resident_bytes()
        return {
            "resident_bytes": resident,
            "peak_resident_bytes": max(peak, resident or 0),  # the kernel updates the peak only from time to time
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        }


def timed_round(
    generate: Callable[..., Any], prompt: Tensor, tokens: int, static_cache: bool = False
) -> dict[str, float]:
    """Read prompts and write new tokens greedily.

    Args:
        generate: `generate` of a model, or of a `GraphDecoder`.
        prompt: tokens of the prompts, `[batch, prompt tokens]`, on the model's device.
        tokens: number of new tokens.
        static_cache: whether the cache of keys and values has its full size from the start.

    Returns:
        Seconds from the prompt to the first new token, and from the first to the last.
    """
    stopwatch = Stopwatch()
    generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=NO_TOKEN,
        max_new_tokens=tokens,
        pad_token_id=0,
        streamer=stopwatch,
        **({"cache_implementation": "static"} if static_cache else {}),
    )
    start, first, *_, last = stopwatch.times
    return {"prefill_seconds": first - start, "decode_seconds": last - first}


def _load(candidate: Candidate, dtype: str, device: torch.device) -> PreTrainedModel:
    """Return the model of a candidate on a device."""
    if candidate.packed:
        return load(candidate.path, dtype=dtype, device_map=str(device))
    model: Any = ModelSource(candidate.path, candidate.gguf_file, dtype).model()
    return model.to(device)


def _weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of parameters and buffers, and of the copies that packed layers made for the device."""
    fused = (module.fused for module in model.modules() if isinstance(module, PackedLinear))
    copies = {id(layers): layers.nbytes for layers in fused if layers is not None}
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + sum(copies.values())
