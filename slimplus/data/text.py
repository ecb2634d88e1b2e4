"""Calibration and evaluation text from the hub, from local files and folders, or from Python's own documentation.

`datasets` and the hub client are imported inside the functions that need them: `check_source` is called while a command
line is validated, and has to answer at once.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from slimplus.data.formats import CHUNK, FORMATS, ColumnError, find_format, is_compressed, read_rows
from slimplus.data.hub import HUB_SOURCES, HubStream, Split, download, streamed_rows
from slimplus.utils.errors import InputError, named_first_line

OFFLINE = "offline"
SELF = "self"  # the calibration text that the model writes
WHOLE = 2**24  # characters that are read of any text, and tokenized as one; WikiText-2's train split has 11 million
CHARACTERS_A_TOKEN = 8  # to read of a longer text: windows are then a choice among several
DAMAGED = (OSError, ValueError, EOFError, zlib.error, RecursionError)  # what the readers raise for bad files

RenderChat = Callable[[Sequence[Mapping[str, Any]]], str]
"""`messages [{"role": …, "content": …}, …] -> text`, such as a tokenizer's chat template gives."""


class TextError(InputError):
    """Error of a text source that is missing, unreadable, empty or too short."""


@dataclass(frozen=True, eq=False)
class Text:
    """The documents of one source.

    Attributes:
        documents: the documents in order.
        separator: string that belongs between them, unless the recipe gives another.
        path: name or path of the source.
        weight: share of the source in a mix, in relation to the other weights.
        is_excerpt: whether documents of the source were left out.
    """

    documents: Sequence[str]
    separator: str = "\n\n"
    path: str = ""
    weight: float = 1.0
    is_excerpt: bool = False

    @cached_property
    def joined(self) -> str:
        """All documents as one string."""
        return self.separator.join(self.documents)


def load_text(path: str, split: Split) -> str:
    """Return the whole text of a source as one string; the arguments and errors are those of `read_text`."""
    return read_text(path, split).joined


def characters_to_read(tokens: int) -> int:
    """Return how many characters of a text to read for windows of so many tokens."""
    return max(WHOLE, CHARACTERS_A_TOKEN * tokens)


def read_text(
    path: str,
    split: Split,
    column: str | None = None,
    limit: int | None = None,
    render_chat: RenderChat | None = None,
    weight: float = 1.0,
) -> Text:
    """Read the text of a source, as a stream: what lies beyond the limit costs nothing.

    Args:
        path: a name in `HUB_SOURCES`, `offline`, or a local file, or a folder with such files, which gives the same
            text for both splits: a whole `.txt` (UTF-8, with all line ends read as line feeds), or a column of a
            `.jsonl`, `.json`, `.csv` or `.parquet` file.
        split: which part of a source in `HUB_SOURCES` or of `offline` to return.
        column: name of the column that holds the text, or the messages of a chat; None is `text`, or else `messages`
            or `conversations`.
        limit: characters after which no further document is read; None reads all.
        render_chat: what makes a text of a chat; None where the tokenizer has no chat template.
        weight: share of the source in a mix.

    Raises:
        TextError: if `check_source` refuses the source, or the source cannot be reached, cannot be read, or holds no
            text.
    """
    check_source(path, split)
    reader = _Reader(path, split, column, render_chat)
    if path == OFFLINE:
        documents, separator = [_offline_text(split)], ""
    elif path in HUB_SOURCES:
        documents, separator = reader.read_hub(), HUB_SOURCES[path].separator
    else:
        documents = reader.read_files(limit)
        separator = "" if reader.has_chats else "\n\n"
    text = Text(documents, separator, path, weight)
    if not any(document.strip() for document in documents):
        raise TextError(f"data.{split}.path: {path!r} holds no text; give {_alternatives()}")
    return text


def share_samples(samples: int, weights: Sequence[float]) -> list[int]:
    """Return how many of the windows each text of a mix gives; the shares of the largest remainders are rounded up."""
    exact = [samples * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: samples - sum(shares)]:
        shares[index] += 1
    return shares


def check_share(path: str, share: int, asked: str) -> None:
    """Check that a text of a mix gives any windows.

    Args:
        path: the text, as the recipe names it.
        share: number of its windows.
        asked: what asks for the windows of the mix, such as `data.samples=2 windows`.

    Raises:
        TextError: if it gives none.
    """
    if not share:
        raise TextError(
            f"data.calibration: the share of {path!r} of {asked} is none; raise its weight or their number, or leave "
            "it out"
        )


def check_source(path: str, split: Split) -> None:
    """Check that `path` is a known source, or a file of a known format with text in it, or a folder with such files.

    The check does not touch the network and imports nothing heavy, so it can run before any work. `self` is known for
    calibration.

    Raises:
        TextError: if `path` is neither.
    """
    if path == OFFLINE or path in HUB_SOURCES or (path == SELF and split == "calibration"):
        return
    source = Path(path).expanduser()
    if not path or not (source.is_dir() or find_format(source)):
        close = difflib.get_close_matches(path, (*HUB_SOURCES, OFFLINE), n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise TextError(f"data.{split}.path: unknown text source {path!r}; give {_alternatives()}{guess}")
    if not source.exists():
        raise TextError(f"data.{split}.path: there is no file {path!r}; give {_alternatives()}")
    files = text_files(source)
    if not files:
        raise TextError(f"data.{split}.path: the folder {path!r} holds no {', '.join(FORMATS)} file; give another")
    empty = True
    for file in files:
        try:
            with file.open("rb") as opened:
                empty = empty and not any(chunk.strip() for chunk in iter(lambda: opened.read(CHUNK), b""))
        except OSError as error:
            raise TextError(
                f"data.{split}.path: {str(file)!r} cannot be read ({error.strerror}); make it readable"
            ) from error
    if empty:
        raise TextError(f"data.{split}.path: {path!r} holds no text; give {_alternatives()}")


def text_files(source: Path) -> list[Path]:
    """Return the files of a source: itself, or those of a known format in a folder and its subfolders, in order."""
    if not source.is_dir():
        return [source]
    found = (file for file in source.rglob("*") if find_format(file) and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(source).parts))


def text_bytes(path: str) -> int | None:
    """Return an upper bound on the bytes of a text, or None if only reading it would tell.

    Chats grow by the chat template, so that the size of a file that may hold some says nothing.
    """
    if path == OFFLINE:
        from pydoc_data.topics import topics

        return sum(len(topic.encode()) for topic in topics.values())
    files = [] if path in HUB_SOURCES or path == SELF else text_files(Path(path).expanduser())
    if not files or any(is_compressed(file) or find_format(file) != ".txt" for file in files):
        return None
    return sum(file.stat().st_size for file in files)


def _alternatives() -> str:
    """Return the part of an error message that lists what a path may be."""
    return f"one of {', '.join(HUB_SOURCES)}, {OFFLINE}, or a local {', '.join(FORMATS)} file"


@dataclass
class _Reader:
    """What reads a source, and words its errors.

    Attributes:
        has_chats: whether a row held a chat.
    """

    path: str
    split: Split
    column: str | None
    render_chat: RenderChat | None
    has_chats: bool = False

    def read_hub(self) -> list[str]:
        """Return the documents of a source on the hub."""
        import pyarrow
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HTTPError

        source = HUB_SOURCES[self.path]
        try:
            if isinstance(source, HubStream):
                rows: list[object] = streamed_rows(self.path, source, self.split)
                return list(self._documents(iter(rows)))
            file = download(source, self.split)
        except TextError:
            raise
        except (*DAMAGED, HTTPError, pyarrow.ArrowException, DatasetsError) as error:
            # HTTPError comes from whichever httpx the hub client uses
            raise TextError(
                f"data.{self.split}.path: {self.path!r} could not be downloaded from the hub ({source.repository}: "
                f"{named_first_line(error)}); run once with a network, or give {OFFLINE} or a local "
                f"{', '.join(FORMATS)} file"
            ) from error
        column = self.column or source.column
        return list(islice(self._read(file, column, WHOLE), source.rows.get(self.split)))

    def read_files(self, limit: int | None) -> list[str]:
        """Return the documents of a file or a folder; where a folder is longer than the limit, a part of each file."""
        files = text_files(Path(self.path).expanduser())
        share = limit
        if limit is not None and sum(file.stat().st_size for file in files) > limit:
            share = -(-limit // len(files))
        return [document for file in files for document in self._read_up_to(file, share)]

    def _read_up_to(self, file: Path, limit: int | None) -> Iterator[str]:
        taken = 0
        for document in self._read(file, self.column, -1 if limit is None else limit):
            yield document
            taken += len(document)
            if limit is not None and taken > limit:
                return

    def _read(self, file: Path, column: str | None, limit: int) -> Iterator[str]:
        """Yield the documents of a file."""
        import pyarrow

        name = self.path if Path(self.path).expanduser() == file or self.path in HUB_SOURCES else str(file)
        try:
            yield from self._documents(read_rows(file, column, limit))
        except ColumnError as error:
            found = ", ".join(map(repr, error.columns)) or "an empty first line"
            raise TextError(
                f"data.{self.split}.path: {name!r} has no column {column or 'text'!r}, only {found}; name the column "
                f"that holds the text in data.{self.split}.column"
            ) from error
        except TextError:
            raise
        except (*DAMAGED, pyarrow.ArrowException) as error:
            kind = (find_format(file) or "").removeprefix(".").replace("txt", "text").replace("jsonl", "json")
            raise TextError(
                f"data.{self.split}.path: {name!r} cannot be read as {kind} ({named_first_line(error)}); "
                f"repair the file, or give {_alternatives()}"
            ) from error

    def _documents(self, rows: Iterator[object]) -> Iterator[str]:
        """Yield the text of each row; rows without a value are left out.

        Raises:
            TextError: if a value is neither a text nor a chat, or a chat cannot be written out.
        """
        for row in rows:
            if row is None:
                continue
            text = row if isinstance(row, str) else self._chat(row)
            if not text.isascii():  # JSON may hold halves of surrogate pairs, which no UTF-8 can
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text

    def _chat(self, row: object) -> str:
        """Return the text of a chat."""
        from jinja2 import TemplateError

        messages = _messages(row)
        if messages is None:
            column = self.column or "the text column"
            kind = type(row).__name__
            raise TextError(
                f"data.{self.split}.path: {column} of {self.path!r} holds {kind} values; it must hold strings, or "
                "chats: lists of messages with role and content"
            )
        if self.render_chat is None:
            raise TextError(
                f"data.{self.split}.path: {self.path!r} holds chats, and the model's tokenizer has no chat template to "
                f"write them out by; give an instruct model, or a column of texts in data.{self.split}.column"
            )
        self.has_chats = True
        try:
            return self.render_chat(messages)
        except (TemplateError, ValueError, TypeError) as error:
            raise TextError(
                f"data.{self.split}.path: the tokenizer's chat template refuses a chat of {self.path!r} "
                f"({named_first_line(error)}); leave such chats out"
            ) from error


SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def _messages(row: object) -> list[dict[str, Any]] | None:
    """Return the messages of a chat with the keys `role` and `content`, or None if the row is no chat.

    ShareGPT's form, `from` and `value`, is taken as well.
    """
    if not isinstance(row, list) or not row or not all(isinstance(message, dict) for message in row):
        return None
    if all("role" in message and "content" in message for message in row):
        return row
    if all("from" in message and "value" in message for message in row):
        return [{"role": SPEAKERS.get(m["from"], m["from"]), "content": m["value"]} for m in row]
    return None


def _offline_text(split: Split) -> str:
    """Return the language reference that every Python ships for `help()`; every third topic is for evaluation.

    Topics quote each other, some entirely. Each paragraph is kept once, in the evaluation part if it occurs in both, so
    that the parts share no paragraph. Number of tokens by SmolLM2's tokenizer, and of windows of 2048 tokens:

    ======  ===========  ===========
    Python  calibration  evaluation
    ======  ===========  ===========
    3.11    55,621 (27)  35,200 (17)
    3.12    57,350 (28)  38,146 (18)
    3.13    59,557 (29)  39,027 (19)
    ======  ===========  ===========
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[::3]
    evaluation = _paragraphs(topics[name] for name in held_out)
    if split == "evaluation":
        return "\n\n".join(evaluation.values())
    calibration = _paragraphs(topics[name] for name in names if name not in held_out)
    return "\n\n".join(text for key, text in calibration.items() if key not in evaluation)


def _paragraphs(documents: Iterable[str]) -> dict[str, str]:
    """Return the distinct paragraphs in order of appearance, keyed by their text without indentation."""
    return {p.strip(): p.strip("\n") for document in documents for p in document.split("\n\n") if p.strip()}
