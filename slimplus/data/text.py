"""Calibration and evaluation text from the hub, from local files, or from Python's own documentation.

`datasets` and the hub client are imported inside the functions that need them: `check_source` is called while a command
line is validated, and has to answer at once.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from slimplus.utils.errors import InputError, named_first_line

Split = Literal["calibration", "evaluation"]


class TextError(InputError):
    """Error of a text source that is missing, unreadable, empty or too short."""


@dataclass(frozen=True)
class TextFormat:
    """How a file becomes a text.

    Attributes:
        builder: name of the builder of `datasets` that reads the file.
        column: name of the column that holds the text.
        separator: string put between rows.
        options: further arguments of the builder.
    """

    builder: str
    column: str
    separator: str
    options: Mapping[str, Any] = field(default_factory=dict)


FILE_FORMATS: Mapping[str, TextFormat] = {
    ".txt": TextFormat("text", "text", "", {"sample_by": "document"}),
    ".jsonl": TextFormat("json", "text", "\n\n"),
    ".parquet": TextFormat("parquet", "text", "\n\n"),
}


@dataclass(frozen=True)
class HubSource:
    """A dataset on the hub.

    Attributes:
        repository: hub id of the dataset.
        files: path in the repository of the file for each split.
        text_format: how the files become text.
        revision: branch, tag or commit.
        rows: number of rows to take for a split; all rows for a split without an entry.
    """

    repository: str
    files: Mapping[Split, str]
    text_format: TextFormat
    revision: str = "main"
    rows: Mapping[Split, int] = field(default_factory=dict)


HUB_SOURCES: Mapping[str, HubSource] = {
    "wikitext2": HubSource(
        repository="Salesforce/wikitext",
        files={
            "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
        text_format=TextFormat("parquet", "text", "\n\n"),
    ),
    # 5000 documents are as long as the train split of WikiText-2 (2.4M tokens). 1100 documents, joined with a space,
    # are the evaluation text of GPTQ and the papers after it.
    "c4": HubSource(
        repository="allenai/c4",
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        text_format=TextFormat("json", "text", " "),
        rows={"calibration": 5000, "evaluation": 1100},
    ),
    # The main revision is a loading script, which `datasets` does not run; the converted one holds the same rows.
    "ptb": HubSource(
        repository="ptb-text-only/ptb_text_only",
        files={
            "calibration": "penn_treebank/train/0000.parquet",
            "evaluation": "penn_treebank/test/0000.parquet",
        },
        text_format=TextFormat("parquet", "sentence", " "),
        revision="refs/convert/parquet",
    ),
}

OFFLINE = "offline"


def load_text(path: str, split: Split) -> str:
    """Return the text of a source as one string.

    Args:
        path: a name in `HUB_SOURCES`, `offline`, or a local file, which gives the same text for both splits: a whole
            `.txt` (UTF-8, with all line ends read as line feeds), or the column `text` of a `.jsonl` or `.parquet`, an
            empty line between rows.
        split: which part of a source in `HUB_SOURCES` or of `offline` to return.

    Raises:
        TextError: if `check_source` refuses the source, or the source cannot be reached, cannot be read, or holds no
            text.
    """
    check_source(path, split)
    if path == OFFLINE:
        return _offline_text(split)
    if path in HUB_SOURCES:
        source = HUB_SOURCES[path]
        text = _read(path, split, _download(path, split), source.text_format, source.rows.get(split))
    else:
        file = Path(path).expanduser()
        text = _read(path, split, file, FILE_FORMATS[file.suffix])
    if not text.strip():
        raise TextError(f"data.{split}.path: {path!r} holds no text; give {_alternatives()}")
    return text


def check_source(path: str, split: Split) -> None:
    """Check that `path` is a known source, or a file of a known format with text in it.

    The check does not touch the network and imports nothing heavy, so it can run before any work.

    Raises:
        TextError: if `path` is neither.
    """
    if path == OFFLINE or path in HUB_SOURCES:
        return
    file = Path(path).expanduser()
    if file.suffix not in FILE_FORMATS:
        close = difflib.get_close_matches(path, (*HUB_SOURCES, OFFLINE), n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise TextError(f"data.{split}.path: unknown text source {path!r}; give {_alternatives()}{guess}")
    if not file.is_file():
        raise TextError(f"data.{split}.path: there is no file {path!r}; give {_alternatives()}")
    try:
        with file.open("rb") as lines:
            empty = not any(line.strip() for line in lines)
    except OSError as error:
        raise TextError(f"data.{split}.path: {path!r} cannot be read ({error.strerror}); make it readable") from error
    if empty:
        raise TextError(f"data.{split}.path: {path!r} holds no text; give {_alternatives()}")


def _alternatives() -> str:
    """Return the part of an error message that lists what a path may be."""
    return f"one of {', '.join(HUB_SOURCES)}, {OFFLINE}, or a local {', '.join(FILE_FORMATS)} file"


def _download(path: str, split: Split) -> Path:
    """Return the local copy of a hub source's file, downloading it if the hub's cache does not hold it.

    The hub client downloads the file, and `_read` reads it like a local one. `load_dataset` would not find its own copy
    of a dataset without a network when files are named, and would convert all of a C4 shard.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    source = HUB_SOURCES[path]
    download = partial(
        hf_hub_download,
        source.repository,
        source.files[split],
        repo_type="dataset",
        revision=source.revision,
    )
    try:
        return Path(download(local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        # Without a network, the download would be retried for half a minute; this request fails at once.
        HfApi().dataset_info(source.repository, revision=source.revision, timeout=10)
        return Path(download())
    except (OSError, HTTPError) as error:  # HTTPError comes from whichever httpx the hub client uses
        raise TextError(
            f"data.{split}.path: {path!r} could not be downloaded from the hub ({source.repository}: "
            f"{named_first_line(error)}); run once with a network, or give {OFFLINE} or a local "
            f"{', '.join(FILE_FORMATS)} file"
        ) from error


def _read(path: str, split: Split, file: Path, text_format: TextFormat, limit: int | None = None) -> str:
    """Return the text of a file, or of its first `limit` rows."""
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        # Streaming reads the file itself and keeps no converted copy, which could become stale.
        with TemporaryDirectory() as cache:
            stream = load_dataset(
                text_format.builder,
                data_files=glob.escape(str(file)),
                split="train",
                streaming=True,
                cache_dir=cache,
                **text_format.options,
            )
            rows = list(islice(stream, limit))
    except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
        raise TextError(
            f"data.{split}.path: {path!r} cannot be read as {text_format.builder} ({named_first_line(error)}); "
            f"repair the file, or give {_alternatives()}"
        ) from error
    return text_format.separator.join(_column(rows, text_format.column, path, split))


def _column(rows: Iterable[Mapping[str, Any]], column: str, path: str, split: Split) -> Iterable[str]:
    """Yield the strings of a column; rows without a value are left out.

    Raises:
        TextError: if a row lacks the column, or the column holds other values than strings.
    """
    for row in rows:
        if column not in row:
            raise TextError(
                f"data.{split}.path: {path!r} has no column {column!r}, only {', '.join(map(repr, row))}; "
                f"rename the column that holds the text"
            )
        value = row[column]
        if value is None:
            continue
        if not isinstance(value, str):
            raise TextError(
                f"data.{split}.path: column {column!r} of {path!r} holds {type(value).__name__} values; "
                f"it must hold strings"
            )
        yield value


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
