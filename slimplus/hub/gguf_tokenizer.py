"""The tokenizer of a GGUF file, from the files that transformers saves.

llama.cpp knows two kinds of BPE by their names in the file:

- `gpt2`: byte-level BPE. A text is split by a regular expression first; `tokenizer.ggml.pre` names it.
- `llama`: that of SentencePiece, with bytes for unknown characters. Spaces are written as `▁`, and of all neighbours
  that make a token together, those that make the token with the highest score are merged first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from slimplus.utils.errors import InputError

# Names by which llama.cpp knows how a text is split before merges (its `tokenizer.ggml.pre`), by the regular expression
# of the split in tokenizer.json, or by the kinds of its steps where no expression is given.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    QWEN2: "qwen2",
    QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
    "Digits, ByteLevel": "smollm",
    "ByteLevel": "gpt-2",
}

SPACE = "▁"
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPENDED = {"type": "Prepend", "prepend": SPACE}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
REMEDY = "`--to dense` holds it, which llama.cpp's convert_hf_to_gguf.py reads"


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> tuple[str, str]:
    """Add the tokenizer in a folder to a GGUF file.

    Args:
        writer: the file.
        folder: folder with tokenizer.json and tokenizer_config.json.
        vocabulary: rows of the embedding; tokens that the tokenizer lacks are filled up.

    Returns:
        The kind of the tokenizer in GGUF, and how exactly llama.cpp splits as it does.

    Raises:
        InputError: if there is no tokenizer, one with more tokens than the embedding has rows, or one that llama.cpp
            would not split alike.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        model, split = tokenizer["model"], _split(tokenizer.get("pre_tokenizer") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); export the checkpoint again") from error
    prefix = _prefixed_space(tokenizer)
    if prefix is None and (model.get("type") != "BPE" or split not in SPLITS):
        raise InputError(
            f"GGUF: the tokenizer ({model.get('type')} after {split or 'no split'}) is none of the byte-level BPE or "
            f"SentencePiece BPE that are written; {REMEDY}"
        )
    special = gguf.SpecialVocab(folder, load_merges=prefix is None, n_vocab=vocabulary)
    unknown = None if prefix is None else special.special_token_ids.get("unk")
    tokens, types = _vocabulary(tokenizer, vocabulary, unknown)
    if prefix is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(SPLITS[split])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(prefix)
        writer.add_token_scores(_scores(model, tokens, types))
        special.add_special_token.setdefault("bos", False)  # llama.cpp adds one unless the file says otherwise
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)
    if prefix and tokenizer.get("pre_tokenizer"):  # Metaspace
        return "llama", "but for one more space before a text that begins with one, or follows a special token"
    return ("gpt2" if prefix is None else "llama"), "yes"


def _split(pre_tokenizer: Mapping[str, Any]) -> str:
    """Return the regular expression by which a text is split, or the kinds of the steps if there is none."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = [
        step["pattern"]["Regex"] for step in steps if step.get("type") == "Split" and "Regex" in step["pattern"]
    ]
    return patterns[0] if len(patterns) == 1 else ", ".join(step.get("type", "") for step in steps)


def _prefixed_space(tokenizer: Mapping[str, Any]) -> bool | None:
    """Return whether a SentencePiece tokenizer puts a space before a text; None if it is another tokenizer."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    pre = tokenizer.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("ignore_merges"):
        return None
    unsplit = pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE and pre.get("split") is False
    if unsplit and not steps:
        return bool(pre.get("prepend_scheme") != "never")
    unsplit = not pre or (pre.get("type") == "Split" and pre["pattern"] == SPACES["pattern"])  # no space is left
    if unsplit and steps and steps[-1] == SPACES and steps[:-1] in ([], [PREPENDED]):
        return len(steps) > 1
    return None


def _vocabulary(tokenizer: Mapping[str, Any], size: int, unknown: int | None) -> tuple[list[str], list[gguf.TokenType]]:
    """Return the tokens by id, and their types; `unknown` is the id of the token for what has no other."""
    model = tokenizer["model"]
    by_id = {index: token for token, index in model["vocab"].items()}
    added = {each["id"]: each for each in tokenizer.get("added_tokens", ())}
    by_id |= {index: each["content"] for index, each in added.items()}
    if (largest := max(by_id, default=0)) >= size:
        raise InputError(f"GGUF: the tokenizer has a token {largest}, but the embedding has only {size} rows")

    def kind(index: int) -> gguf.TokenType:
        token = by_id.get(index)
        if token is None:
            return gguf.TokenType.UNUSED
        if index == unknown:
            return gguf.TokenType.UNKNOWN
        if index in added:
            return gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        return gguf.TokenType.BYTE if model.get("byte_fallback") and BYTE.fullmatch(token) else gguf.TokenType.NORMAL

    return [by_id.get(index, f"[PAD{index}]") for index in range(size)], [kind(index) for index in range(size)]


def _scores(model: Mapping[str, Any], tokens: Sequence[str], types: Sequence[gguf.TokenType]) -> list[float]:
    """Return the score of each token: SentencePiece merges in the order of scores, tokenizer.json in that of a list.

    Raises:
        InputError: if no scores give the merges of tokenizer.json.
    """
    ranks: dict[str, int] = {}
    merges, last = set(), ""
    for left, right in _merges(model):
        merges.add((left, right))
        token = left + right
        if token != last and token in ranks:
            raise _no_scores(token)
        ranks.setdefault(token, len(ranks))
        last = token
    for token, kind in zip(tokens, types, strict=True):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token) if kind == gguf.TokenType.NORMAL else 0))
        if any(pair not in merges and all(part in model["vocab"] for part in pair) for pair in pairs):
            raise _no_scores(token)  # llama.cpp merges any two neighbours that make a token
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the merges of tokenizer.json, which older files write as one string."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _no_scores(token: str) -> InputError:
    return InputError(
        f"GGUF: tokenizer.json merges {token!r} otherwise than a SentencePiece model does, whose tokens have scores; "
        f"{REMEDY}"
    )
