"""Fixed token windows, tokenized once and kept in a file with the fingerprint of what they came from."""

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
    """Token windows.

    ``tokens``: int64 [windows, sequence_length]. ``fingerprint``: SHA-256 over the text, the tokenizer, the
    seed and the sizes, in hexadecimal; equal fingerprints mean equal tokens.
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
    """``samples`` windows in random order out of the consecutive, non-overlapping windows of the text.

    Where ``cache`` holds the windows of the same fingerprint they are loaded without tokenizing; otherwise
    they are built and written there. Raises ``TextError`` where the text holds fewer windows.
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
    """The first ``windows`` consecutive windows of the text, or all where it holds fewer.

    ``cache`` as for ``calibration_windows``. Raises ``TextError`` where the text holds no whole window.
    """

    def build() -> Tensor:
        candidates = _cut(text, tokenizer, sequence_length)
        if len(candidates) == 0:
            raise TextError(
                f"the evaluation text is shorter than one window of {sequence_length} tokens; "
                f"lower the evaluation's sequence length, or give a longer text in data.evaluation.path"
            )
        return candidates[:windows].clone()  # a view would keep the whole text's tokens alive

    sizes = {"windows": windows, "sequence_length": sequence_length}
    return _cached(cache, _fingerprint(text, tokenizer, sizes), build)


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Tensor:
    """All whole windows of the text, int64 [windows, sequence_length]; a shorter tail is dropped."""
    # verbose=False: that the text is longer than the model's context is the point here, not a mistake.
    encoding = tokenizer(text, verbose=False, return_attention_mask=False)
    tokens = torch.tensor(encoding["input_ids"], dtype=torch.int64)
    count = len(tokens) // sequence_length
    return tokens[: count * sequence_length].view(count, sequence_length)


def _fingerprint(text: str, tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int]) -> str:
    digest = hashlib.sha256()
    for part in (json.dumps(sizes), tokenizer_identity(tokenizer), text):
        # Each part is hashed on its own, so that nothing can move from one part to the next unnoticed.
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides how a text becomes tokens: vocabulary, merges, normalization, special tokens."""
    if tokenizer.is_fast:
        return str(tokenizer.backend_tokenizer.to_str())
    return repr(tokenizer) + json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _cached(path: Path | None, fingerprint: str, build: Callable[[], Tensor]) -> Windows:
    if path is None:
        return Windows(build(), fingerprint)
    tokens = _read(path, fingerprint)
    if tokens is None:
        tokens = build()
        write_atomic(path, save({"tokens": tokens}, metadata={"fingerprint": fingerprint}))
    return Windows(tokens, fingerprint)


def _read(path: Path, fingerprint: str) -> Tensor | None:
    """The cached tokens, or None where the file is missing, damaged, or made from something else."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            return file.get_tensor("tokens")
    except (FileNotFoundError, SafetensorError):
        return None
