"""What a measurement of speed is of: the models, and the work that each of them does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        path: folder or hub id of the model.
        packed: whether the model is a packed checkpoint.
        gguf_file: name of the GGUF file in `path` that holds the weights, if one does.
    """

    path: str
    packed: bool
    gguf_file: str | None = None


@dataclass(frozen=True)
class Workload:
    """What each model does in a measurement: it reads one prompt and writes one text.

    Attributes:
        prompt_tokens: number of tokens in the prompt.
        new_tokens: number of tokens to write, at least 2; the first one counts as prefill.
        rounds: number of timed rounds, after one to warm up.
        device: `auto`, or the name of a torch device.
        dtype: name of a torch dtype, or `auto` for the stored one.
        static_cache: whether to decode with a static cache, for which transformers compiles the step on a GPU.
        graph: whether to decode with a `GraphDecoder`.
    """

    prompt_tokens: int
    new_tokens: int
    rounds: int
    device: str = "auto"
    dtype: str = "bfloat16"
    static_cache: bool = False
    graph: bool = False
