"""The tokenizer of a GGUF file, from the files that transformers saves."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Add the tokenizer in a folder to a GGUF file.

    Args:
        writer: the file.
        folder: folder with tokenizer.json and tokenizer_config.json.
        vocabulary: rows of the embedding; tokens that the tokenizer lacks are filled up.

    Raises:
        InputError: if there is no tokenizer, one with more tokens than the embedding has rows, or one that is no
            byte-level BPE whose split llama.cpp knows.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        model, split = tokenizer["model"], _split(tokenizer.get("pre_tokenizer") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); export the checkpoint again") from error
    if model.get("type") != "BPE" or split not in SPLITS:
        raise InputError(
            f"GGUF: the tokenizer ({model.get('type')} after {split or 'no split'}) is not one of the byte-level BPE "
            "that is written; `--to dense` holds it, which llama.cpp's convert_hf_to_gguf.py reads"
        )
    tokens, types = _vocabulary(tokenizer, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS[split])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    special.add_to_gguf(writer, quiet=True)


def _split(pre_tokenizer: Mapping[str, Any]) -> str:
    """Return the regular expression by which a text is split, or the kinds of the steps if there is none."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = [
        step["pattern"]["Regex"] for step in steps if step.get("type") == "Split" and "Regex" in step["pattern"]
    ]
    return patterns[0] if len(patterns) == 1 else ", ".join(step.get("type", "") for step in steps)


def _vocabulary(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Return the tokens by id, and their types."""
    by_id = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    added = {each["id"]: each for each in tokenizer.get("added_tokens", ())}
    by_id |= {index: each["content"] for index, each in added.items()}
    if (largest := max(by_id, default=0)) >= size:
        raise InputError(f"GGUF: the tokenizer has a token {largest}, but the embedding has only {size} rows")
    tokens, types = [], []
    for index in range(size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index in added:
            types.append(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED)
    return tokens, types
