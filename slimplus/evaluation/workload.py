"""TODO."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        path: folder or hub id.
        packed: whether it is a packed checkpoint.
        gguf_file: the file in `path` that holds the weights, if it is a GGUF.
    """

    path: str
    packed: bool
    gguf_file: str | None = None


@dataclass(frozen=True)
class Workload:
    """What is measured: one prompt, one text.

    Attributes:
        prompt_tokens: length of the prompt.
        new_tokens: tokens to make, at least 2; the first one counts as prefill.
        rounds: timed ones, after one that is not.
        device: `auto`, or the name of a torch device.
        dtype: name of a torch dtype, or `auto` for the stored one.
        static_cache: decode with a static cache, which transformers compiles for on a GPU.
    """

    prompt_tokens: int
    new_tokens: int
    rounds: int
    device: str = "auto"
    dtype: str = "bfloat16"
    static_cache: bool = False
