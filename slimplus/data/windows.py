"""Fixed token windows, tokenized once and kept in a file with the fingerprint of what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimplus.data.text import TextError
from slimplus.utils.files import write_atomic


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens, all of the same length.

    Attributes:
        tokens: `[windows, sequence_length]`, int64.
        fingerprint: SHA-256 over the text, the tokenizer, the seed and the sizes, in hexadecimal; equal fingerprints
            mean equal tokens.
    """

    tokens: Tensor
    fingerprint: str


def calibration_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int,
    cache: Path | None = None,
) -> Windows:
    """Return windows drawn at random from the consecutive, non-overlapping windows of a text.

    Args:
        text: the calibration text.
        tokenizer: the model's tokenizer.
        samples: number of windows to draw.
        sequence_length: tokens per window.
        seed: seed of the draw and of the order.
        cache: file that keeps the windows; they are loaded from it, without tokenizing, if its fingerprint is equal,
            and otherwise built and written to it.

    Raises:
        TextError: if the text holds fewer windows.
    """

    def build() -> Tensor:
        candidates = _cut(text, tokenizer, sequence_length)
        if len(candidates) < samples:
            raise TextError(
                f"the calibration text holds {len(candidates)} windows of "
                f"data.sequence_length={sequence_length} tokens, fewer than data.samples={samples}; "
                f"lower data.samples or data.sequence_length, or give a longer text in data.calibration.path"
            )
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        return candidates[order[:samples]]

    sizes = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    return _cached(cache, _fingerprint(text, tokenizer, sizes), build)


def evaluation_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    sequence_length: int,
    cache: Path | None = None,
) -> Windows:
    """Return the first consecutive windows of a text.

    Args:
        text: the evaluation text.
        tokenizer: the model's tokenizer.
        windows: number of windows to return; all windows of the text if it holds fewer.
        sequence_length: tokens per window.
        cache: file that keeps the windows, as for `calibration_windows`.

    Raises:
        TextError: if the text does not hold one whole window.
    """

    def build() -> Tensor:
        candidates = _cut(text, tokenizer, sequence_length)
        if len(candidates) == 0:
            raise TextError(
                f"the evaluation text is shorter than one window of {sequence_length} tokens; lower "
                f"data.evaluation.sequence_length, or give a longer text in data.evaluation.path"
            )
        return candidates[:windows].clone()  # a view would keep the whole text's tokens alive

    sizes = {"windows": windows, "sequence_length": sequence_length}
    return _cached(cache, _fingerprint(text, tokenizer, sizes), build)


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Tensor:
    """Return all whole windows of a text, `[windows, sequence_length]`, int64; a shorter tail is dropped."""
    # verbose=False silences the warning that the text is longer than the model's context, as it is meant to be.
    encoding = tokenizer(text, verbose=False, return_attention_mask=False)
    tokens = torch.tensor(encoding["input_ids"], dtype=torch.int64)
    count = len(tokens) // sequence_length
    return tokens[: count * sequence_length].view(count, sequence_length)


def _fingerprint(text: str, tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int]) -> str:
    """Return the SHA-256 of all that decides the tokens of windows, in hexadecimal."""
    digest = hashlib.sha256()
    for part in (json.dumps(sizes), tokenizer_identity(tokenizer), text):
        # Each part is hashed on its own: joined, two different splits into parts could give the same bytes.
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all that decides how a text becomes tokens: vocabulary, merges, normalization, special tokens."""
    if tokenizer.is_fast:
        return str(tokenizer.backend_tokenizer.to_str())
    return repr(tokenizer) + json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _cached(path: Path | None, fingerprint: str, build: Callable[[], Tensor]) -> Windows:
    """Return the windows that `path` holds, if made from the same parts, and those of `build` otherwise."""
    if path is None:
        return Windows(build(), fingerprint)
    tokens = _read(path, fingerprint)
    if tokens is None:
        tokens = build()
        write_atomic(path, save({"tokens": tokens}, metadata={"fingerprint": fingerprint}))
    return Windows(tokens, fingerprint)


def _read(path: Path, fingerprint: str) -> Tensor | None:
    """Return the tokens of a cache file, or None if it is missing, damaged, or has another fingerprint."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            return file.get_tensor("tokens")
    except (FileNotFoundError, SafetensorError):
        return None
