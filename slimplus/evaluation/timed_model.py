"""One model, loaded and timed in this process."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from slimplus.evaluation.generation import find_device
from slimplus.evaluation.workload import Candidate, Workload
from slimplus.hub.checkpoint import load
from slimplus.models.loading import ModelSource
from slimplus.nn import PackedLinear
from slimplus.utils.machine import peak_resident_bytes, resident_bytes


class Stopwatch(BaseStreamer):
    """The moment at which `generate` hands over the prompt, and each token after it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with tensors on the CPU: the device has computed them."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to write."""


class TimedModel:
    """A loaded model that has been through one round.

    Args:
        candidate: which one.
        workload: what a round is.

    Attributes:
        facts: what loading it told.

    Raises:
        InputError: if the model or the device cannot be had.
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
        vocabulary = self.model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(vocabulary, (1, workload.prompt_tokens), generator=generator).to(self.device)
        self.round()

    def round(self) -> dict[str, float]:
        """Read the prompt and write the new tokens, greedily.

        Returns:
            Seconds to the first token, and from it to the last.
        """
        stopwatch, tokens = Stopwatch(), self.workload.new_tokens
        self.model.generate(
            input_ids=self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            streamer=stopwatch,
            **({"cache_implementation": "static"} if self.workload.static_cache else {}),
        )
        before, first, *_, last = stopwatch.times
        return {"prefill_seconds": first - before, "decode_seconds": last - first}

    def memory(self) -> dict[str, int | None]:
        """Of this process so far, libraries included; of the device, what PyTorch allocated there."""
        resident = resident_bytes()
        peak = peak_resident_bytes()
        return {
            "resident_bytes": resident,
            "peak_resident_bytes": max(peak, resident or 0),  # the kernel brings the peak up to date only now and then
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        }


def _load(candidate: Candidate, dtype: str, device: torch.device) -> PreTrainedModel:
    if candidate.packed:
        return load(candidate.path, dtype=dtype, device_map=str(device))
    model: Any = ModelSource(candidate.path, candidate.gguf_file, dtype).model()
    return model.to(device)


def _weight_bytes(model: PreTrainedModel) -> int:
    """Parameters and buffers, and what packed layers were repacked to for the device."""
    packed = (module.fused for module in model.modules() if isinstance(module, PackedLinear))
    forms = {id(fused): fused.nbytes for fused in packed if fused is not None}
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + sum(forms.values())
