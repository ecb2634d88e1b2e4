"""Fixed token windows, tokenized once and kept in a file with the fingerprint of what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimplus.data.text import SELF, WHOLE, RenderChat, Text, TextError, check_share, share_samples
from slimplus.utils.files import write_atomic

PART = 2**18  # characters of a longer text that are tokenized at a time
THINNED = 16  # characters of a longer text that are tokenized for each token to draw: about four times as many


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


@dataclass(frozen=True, eq=False)
class WrittenText:
    """Calibration text that a model writes itself, window by window, to a file.

    Attributes:
        file: the file with the windows so far, which may not exist.
        fingerprint: SHA-256 of all that decides the windows, in hexadecimal.
        path: name of the source.
        weight: share of the source in a mix, in relation to the other weights.
    """

    file: Path
    fingerprint: str
    path: str = SELF
    weight: float = 1.0

    def tokens(self) -> Tensor | None:
        """Return the windows so far, `[windows, sequence_length]`, int32, or None if there are none."""
        return _read(self.file, self.fingerprint)

    def content(self, tokens: Tensor) -> bytes:
        """Return what the file holds once `tokens` have been written."""
        return save({"tokens": tokens.int()}, metadata={"fingerprint": self.fingerprint})


@dataclass(frozen=True)
class Packing:
    """How documents are put one after the other before they are cut into windows.

    Attributes:
        bos: where the beginning-of-text token stands: at the beginning of the text if the tokenizer puts it there
            (`auto`), nowhere, before each document, or at the beginning of each window.
        separator: text between documents; `eos` is the tokenizer's end-of-text token; None is the source's own.
    """

    bos: Literal["auto", "never", "document", "window"] = "auto"
    separator: str | None = None


AS_IS = Packing()


def calibration_windows(
    texts: str | Sequence[Text | WrittenText],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    seed: int,
    cache: Path | None = None,
    packing: Packing = AS_IS,
) -> Windows:
    """Return windows drawn at random from the consecutive, non-overlapping windows of texts.

    Args:
        texts: the calibration text, or several, which share the windows in proportion to their weights.
        tokenizer: the model's tokenizer.
        samples: number of windows to draw.
        sequence_length: tokens per window.
        seed: seed of the draw and of the order.
        cache: file that keeps the windows; they are loaded from it, without tokenizing, if its fingerprint is equal,
            and otherwise built and written to it.
        packing: how documents are put one after the other.

    Raises:
        TextError: if a text holds fewer windows than its share, or the tokenizer lacks a token that `packing` needs.
    """
    sources = [Text((texts,))] if isinstance(texts, str) else texts
    shares = share_samples(samples, [text.weight for text in sources])

    def build() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for text, share in zip(sources, shares, strict=True):
            check_share(text.path, share, f"data.samples={samples} windows")
            candidates = _candidates(text, tokenizer, share, sequence_length, packing)
            if len(candidates) < share:
                raise TextError(_too_short(text, len(candidates), share, samples, sequence_length, len(sources) > 1))
            order = torch.randperm(len(candidates), generator=generator)
            drawn.append(candidates[order[:share]].long())
        if len(drawn) == 1:
            return drawn[0]
        return torch.cat(drawn)[torch.randperm(samples, generator=generator)]

    sizes: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    if packing != AS_IS:
        sizes["packing"] = asdict(packing)
    return _cached(cache, _fingerprint(texts_identity(sources), tokenizer, sizes), build)


def texts_identity(texts: Sequence[Text | WrittenText]) -> str:
    """Return what identifies calibration texts: of one the text itself, of a mix the hashes and the weights.

    Of text that the model writes, the fingerprint takes the place of the text or of its hash.
    """
    first, *others = texts
    if not others:
        return first.joined if isinstance(first, Text) else first.fingerprint
    return json.dumps([[text.weight, _hash(text)] for text in texts])


def _hash(text: Text | WrittenText) -> str:
    """Return the SHA-256 of a text in hexadecimal, or the fingerprint of one that the model writes."""
    return hashlib.sha256(text.joined.encode()).hexdigest() if isinstance(text, Text) else text.fingerprint


def _candidates(
    text: Text | WrittenText, tokenizer: PreTrainedTokenizerBase, share: int, sequence_length: int, packing: Packing
) -> Tensor:
    """Return the windows to draw `share` of, `[windows, sequence_length]`; of a long text, some of them."""
    if isinstance(text, WrittenText):
        written = text.tokens()
        return torch.empty(0, sequence_length) if written is None else written
    thinned = _thin(text, THINNED * share * sequence_length)
    candidates = _cut(thinned, tokenizer, sequence_length, packing)
    if len(candidates) < share and thinned is not text:  # the documents that were left out may be the long ones
        return _cut(text, tokenizer, sequence_length, packing)
    return candidates


def draw_prefixes(text: Text, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> Tensor:
    """Return windows drawn at random from a text for a model to continue; again the same ones if it holds fewer.

    Args:
        text: the text.
        tokenizer: the model's tokenizer.
        count: number of windows to return.
        length: tokens in a window.
        seed: seed of the draw.

    Returns:
        `[count, length]`, int64.

    Raises:
        TextError: if the text does not hold one window.
    """
    candidates = _candidates(text, tokenizer, count, length, AS_IS)
    if not len(candidates):
        raise TextError(
            f"data.generation.prompts: {text.path!r} is shorter than data.generation.prefix_tokens={length}; lower it, "
            "or give a longer text"
        )
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return candidates[order[torch.arange(count) % len(candidates)]]


def _too_short(
    text: Text | WrittenText, found: int, share: int, samples: int, sequence_length: int, is_mix: bool
) -> str:
    """Return the message on a text that holds fewer windows than are to be drawn from it."""
    if is_mix:
        return (
            f"data.calibration: {text.path!r} holds {found} windows of data.sequence_length={sequence_length} tokens, "
            f"fewer than its share of {share} of data.samples={samples}; lower its weight, data.samples or "
            "data.sequence_length, or give a longer text"
        )
    return (
        f"the calibration text holds {found} windows of data.sequence_length={sequence_length} tokens, fewer than "
        f"data.samples={samples}; lower data.samples or data.sequence_length, or give a longer text in "
        "data.calibration.path"
    )


def evaluation_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    sequence_length: int,
    cache: Path | None = None,
    stride: int | None = None,
    bos: Literal["auto", "never", "window"] = "auto",
) -> Windows:
    """Return the first windows of a text.

    Args:
        text: the evaluation text.
        tokenizer: the model's tokenizer.
        windows: number of windows to return; all windows of the text if it holds fewer.
        sequence_length: tokens per window.
        cache: file that keeps the windows, as for `calibration_windows`.
        stride: tokens of the text from the start of a window to that of the next; None puts windows side by side.
        bos: where the beginning-of-text token stands, see `Packing`.

    Raises:
        TextError: if the text does not hold one whole window, or the tokenizer lacks a token that `bos` needs.
    """

    def build() -> Tensor:
        candidates = _cut(Text((text,)), tokenizer, sequence_length, Packing(bos), stride)
        if len(candidates) == 0:
            raise TextError(
                f"the evaluation text is shorter than one window of {sequence_length} tokens; lower "
                f"data.evaluation.sequence_length, or give a longer text in data.evaluation.path"
            )
        return candidates[:windows].clone()  # a view would keep the whole text's tokens alive

    sizes: dict[str, Any] = {"windows": windows, "sequence_length": sequence_length}
    if stride is not None or bos != "auto":
        sizes |= {"stride": stride, "bos": bos}
    return _cached(cache, _fingerprint(text, tokenizer, sizes), build)


def check_ids(tokens: Tensor, rows: int, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Check that a model's embedding has a row for every token of a text.

    Args:
        tokens: ids, of any shape.
        rows: rows of the embedding.
        tokenizer: the model's tokenizer.
        key: key of the recipe, or the argument, that gives the text.

    Raises:
        TextError: naming a token that has none.
    """
    if (beyond := tokens[tokens >= rows]).numel():
        token = int(beyond[0])
        raise TextError(
            f"{key}: the tokenizer makes token {token} ({tokenizer.decode([token])!r}) of it, and the model's "
            f"embedding has {rows} rows, for tokens 0 to {rows - 1}; give the tokenizer that belongs to the model, or "
            "resize the model's embedding and train the new rows"
        )


def _cut(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    packing: Packing = AS_IS,
    stride: int | None = None,
) -> Tensor:
    """Return all whole windows of a text, `[windows, sequence_length]`, int64; a shorter tail is dropped."""
    starts = _special_token(tokenizer, "bos") if packing.bos == "window" else None
    length = sequence_length - (starts is not None)
    tokens = torch.cat([torch.tensor(part, dtype=torch.int32) for part in _tokenize(text, tokenizer, packing)])
    if len(tokens) < length:
        return torch.empty(0, sequence_length, dtype=torch.int64)
    windows = tokens.unfold(0, length, stride or length).long()
    return windows if starts is None else torch.nn.functional.pad(windows, (1, 0), value=starts)


def _tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, packing: Packing) -> Iterator[list[int]]:
    """Yield the tokens of a text, part by part.

    A text of up to `WHOLE` characters is tokenized as one, a longer one and what `_thin` leaves of it in parts that end
    where a line does: the tokenizer needs a hundred bytes for every token of what it is given at once.
    """
    separator = text.separator if packing.separator is None else packing.separator
    if separator == "eos":
        separator = str(tokenizer.convert_ids_to_tokens(_special_token(tokenizer, "eos")))
    # verbose=False silences the warning that the text is longer than the model's context, as it is meant to be.
    encode: Any = partial(tokenizer.__call__, verbose=False, return_attention_mask=False)
    if packing.bos == "document":
        start, documents = _special_token(tokenizer, "bos"), [each for each in text.documents if each]
        for number, document in enumerate(documents, start=1):
            ended = document + (separator if number < len(documents) else "")
            yield [start, *encode(ended, add_special_tokens=False)["input_ids"]]
        return
    joined = text.joined if separator == text.separator else separator.join(text.documents)
    special = packing.bos == "auto"
    for part in [joined] if len(joined) <= WHOLE and not text.is_excerpt else _lines(joined):
        yield encode(part, add_special_tokens=special)["input_ids"]
        special = False  # they belong to the beginning of the text


def _thin(text: Text, characters: int) -> Text:
    """Return evenly spaced documents of a text longer than `WHOLE`, with about so many characters; else the text.

    Tokenizing all of a long text would take a minute, for windows of which most are not drawn.
    """
    step = len(text.joined) // characters
    if len(text.joined) <= WHOLE or step <= 1:
        return text
    documents = [part for document in text.documents for part in _lines(document)]
    return replace(text, documents=documents[::step], is_excerpt=True)


def _lines(text: str) -> Iterator[str]:
    """Yield a text in parts of about `PART` characters that end with a line, or anywhere if lines are longer."""
    start = 0
    while start < len(text):
        stop = text.rfind("\n", start, start + PART) + 1 if start + PART < len(text) else len(text)
        stop = stop or start + PART
        yield text[start:stop]
        start = stop


def _special_token(tokenizer: PreTrainedTokenizerBase, name: Literal["bos", "eos"]) -> int:
    """Return the id of a special token.

    Raises:
        TextError: if the tokenizer has none.
    """
    token: int | None = tokenizer.bos_token_id if name == "bos" else tokenizer.eos_token_id
    if token is None:
        key, others = ("data.bos", "auto or never") if name == "bos" else ("data.separator", "a text, such as '\\n\\n'")
        raise TextError(f"{key}: the model's tokenizer has no {name.upper()} token; give {others}")
    return token


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> RenderChat | None:
    """Return what writes a chat out by the tokenizer's chat template, or None if it has none.

    Where the tokenizer begins texts with a token, the same token that the template begins with is left out:
    `Packing.bos` says where it stands.
    """
    if not tokenizer.chat_template:
        return None
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = str(tokenizer.bos_token) if begins else ""

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        text = str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
        return text.removeprefix(bos)

    return render


def _fingerprint(text: str, tokenizer: PreTrainedTokenizerBase, sizes: Mapping[str, Any]) -> str:
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
