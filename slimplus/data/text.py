"""Calibration and evaluation text from the hub, from local files, or from Python's own documentation.

``datasets`` and the hub client are imported inside the functions that need them: ``check_source`` is called
while a command line is validated and has to answer at once.
"""

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
    """A text source is missing, unreadable, empty or too short; the message is one sentence for the user."""


@dataclass(frozen=True)
class TextFormat:
    """How a file becomes a text: the builder of ``datasets`` that reads it, the column, what joins rows."""

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
    """A dataset on the hub: the file and, where not all are wanted, the number of rows for each split."""

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
    # 5000 documents are as long as WikiText-2's train split (2.4M tokens); 1100 documents, joined with a
    # space, are the evaluation text of GPTQ and its successors.
    "c4": HubSource(
        repository="allenai/c4",
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        text_format=TextFormat("json", "text", " "),
        rows={"calibration": 5000, "evaluation": 1100},
    ),
    # The main revision is a loading script, which `datasets` no longer runs; this one has its rows.
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
    """The text of a source as one string.

    ``path`` is a name in ``HUB_SOURCES``, ``offline``, or a local file, the same text for both splits: a
    whole ``.txt`` (UTF-8, line ends read as ``\\n``), or the column ``text`` of a ``.jsonl`` or ``.parquet``
    with an empty line between rows.

    Raises ``TextError`` where ``check_source`` does, and where the source cannot be reached, cannot be read,
    or holds no text.
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
    """Raises ``TextError`` where ``path`` is neither a known source nor a file of a known format with text in it.

    Does not touch the network and imports nothing heavy, so it can run before any work.
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
    return f"one of {', '.join(HUB_SOURCES)}, {OFFLINE}, or a local {', '.join(FILE_FORMATS)} file"


def _download(path: str, split: Split) -> Path:
    """The local copy of a hub source's file, from the hub's cache where it is there.

    The file is downloaded by the hub client and read like a local one, because ``load_dataset`` does not find
    its own copy of a dataset without a network when files are named, and would convert all of a C4 shard.
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
        # Without a network the download is retried for half a minute; this request fails at once.
        HfApi().dataset_info(source.repository, revision=source.revision, timeout=10)
        return Path(download())
    except (OSError, HTTPError) as error:  # HTTPError: of whichever httpx the hub client uses
        raise TextError(
            f"data.{split}.path: {path!r} could not be downloaded from the hub ({source.repository}: "
            f"{named_first_line(error)}); run once with a network, or give {OFFLINE} or a local "
            f"{', '.join(FILE_FORMATS)} file"
        ) from error


def _read(path: str, split: Split, file: Path, text_format: TextFormat, limit: int | None = None) -> str:
    """The text of a file, or of its first ``limit`` rows."""
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        # Streaming reads the file as it is now: no converted copy is kept that could go stale.
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
    """The strings of a column; rows without a value are left out."""
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
    """The language reference that every Python ships for ``help()``; every third topic is for evaluation.

    Topics quote each other, some entirely, so a paragraph is kept once, in the evaluation part if it occurs
    there: the parts share no paragraph. Tokens by SmolLM2's tokenizer (windows of 2048):

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
    """The distinct paragraphs in order of appearance, keyed by their text without indentation."""
    return {p.strip(): p.strip("\n") for document in documents for p in document.split("\n\n") if p.strip()}
