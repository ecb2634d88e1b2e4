"""Named texts on the hub: small files are downloaded whole, of large datasets the first rows are streamed.

`datasets` and the hub client are imported inside the functions that need them: the names are checked while a command
line is validated.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from slimplus.utils.files import write_atomic

Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class HubSource:
    """A dataset on the hub of which one file is downloaded for each split.

    Attributes:
        repository: hub id of the dataset.
        files: path in the repository of the file for each split.
        column: name of the column that holds the text.
        separator: string put between rows.
        revision: branch, tag or commit.
        rows: number of rows to take for a split; all rows for a split without an entry.
    """

    repository: str
    files: Mapping[Split, str]
    column: str = "text"
    separator: str = "\n\n"
    revision: str = "main"
    rows: Mapping[Split, int] = field(default_factory=dict)


@dataclass(frozen=True)
class HubStream:
    """A dataset on the hub that is too large to download, of which `datasets` streams the first rows.

    Attributes:
        repository: hub id of the dataset.
        arguments: arguments of `datasets.load_dataset` for each part of the dataset; rows are taken from them in turn.
        splits: split of the dataset for each split here. Where both are the same, evaluation takes the rows that follow
            those of calibration.
        column: name of the column that holds the text.
        separator: string put between rows.
        rows: number of rows to take for a split.
    """

    repository: str
    arguments: tuple[Mapping[str, Any], ...]
    splits: Mapping[Split, str] = field(default_factory=lambda: {"calibration": "train", "evaluation": "train"})
    column: str = "text"
    separator: str = "\n\n"
    rows: Mapping[Split, int] = field(default_factory=lambda: {"calibration": 5000, "evaluation": 1000})


_RED_PAJAMA = "togethercomputer/RedPajama-Data-1T-Sample"
_RED_PAJAMA_PARTS = ("arxiv", "book", "c4", "cc_2019-30", "cc_2023-06", "github", "stackexchange", "wikipedia")
_LANGUAGES = ("c", "c++", "go", "java", "javascript", "python", "rust", "shell")

HUB_SOURCES: Mapping[str, HubSource | HubStream] = {
    "wikitext2": HubSource(
        repository="Salesforce/wikitext",
        files={
            "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
    ),
    # 5000 documents are as long as the train split of WikiText-2 (2.4M tokens). 1100 documents, joined with a space,
    # are the evaluation text of GPTQ and the papers after it.
    "c4": HubSource(
        repository="allenai/c4",
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        separator=" ",
        rows={"calibration": 5000, "evaluation": 1100},
    ),
    # The main revision is a loading script, which `datasets` does not run; the converted one holds the same rows.
    "ptb": HubSource(
        repository="ptb-text-only/ptb_text_only",
        files={
            "calibration": "penn_treebank/train/0000.parquet",
            "evaluation": "penn_treebank/test/0000.parquet",
        },
        column="sentence",
        separator=" ",
        revision="refs/convert/parquet",
    ),
    "pile": HubStream("NeelNanda/pile-10k", ({},)),  # 10,000 documents of the Pile, which itself is not on the hub
    "fineweb": HubStream("HuggingFaceFW/fineweb", ({"name": "sample-10BT"},)),
    # The repository's loading script names these files, whose other columns differ.
    "redpajama": HubStream(
        _RED_PAJAMA,
        tuple(
            {"path": "json", "data_files": f"hf://datasets/{_RED_PAJAMA}/{part}_sample.jsonl"}
            for part in _RED_PAJAMA_PARTS
        ),
    ),
    "slimpajama": HubStream("DKYoon/SlimPajama-6B", ({},), {"calibration": "train", "evaluation": "test"}),
    # One folder for each language; the hub asks for a login and an agreement.
    "the-stack-smol": HubStream(
        "bigcode/the-stack-smol", tuple({"data_dir": f"data/{name}"} for name in _LANGUAGES), column="content"
    ),
    "ultrachat": HubStream(
        "HuggingFaceH4/ultrachat_200k",
        ({},),
        {"calibration": "train_sft", "evaluation": "test_sft"},
        column="messages",
        separator="",
    ),
}


def download(source: HubSource, split: Split) -> Path:
    """Return the local copy of a hub source's file, downloading it if the hub's cache does not hold it.

    The hub client downloads the file, and it is read like a local one. `load_dataset` would not find its own copy of a
    dataset without a network when files are named, and would convert all of a C4 shard.

    Raises:
        OSError: or `huggingface_hub.errors.HTTPError`, if the hub does not give the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    get = partial(
        hf_hub_download, source.repository, source.files[split], repo_type="dataset", revision=source.revision
    )
    try:
        return Path(get(local_files_only=True))
    except LocalEntryNotFoundError:
        _check_connection(source.repository, source.revision)
        return Path(get())


def streamed_rows(name: str, source: HubStream, split: Split) -> list[object]:
    """Return the text column of a stream's rows for a split.

    The rows are kept in a file below the cache of `datasets`, so that a run goes on without a network, on the same
    text.

    Args:
        name: name of the source in `HUB_SOURCES`.
        source: the dataset.
        split: which rows to return.

    Raises:
        OSError: or `huggingface_hub.errors.HTTPError`, if the hub does not give the rows.
        ValueError: if the dataset has another form than `source` says; also as `datasets.exceptions.DatasetsError`.
    """
    from datasets import config

    cache = Path(config.HF_DATASETS_CACHE) / "slimplus" / f"{name}.{split}.{source.rows[split]}.json.gz"
    if cache.is_file():
        rows: list[object] = json.loads(gzip.decompress(cache.read_bytes()))
        return rows
    _check_connection(source.repository)
    skipped = source.rows["calibration"] if split == "evaluation" and len(set(source.splits.values())) == 1 else 0
    rows = list(islice(_stream(source, split), skipped, skipped + source.rows[split]))
    write_atomic(cache, gzip.compress(json.dumps(rows).encode(), compresslevel=1, mtime=0))
    return rows


def _stream(source: HubStream, split: Split) -> Iterator[object]:
    """Yield the text column of all rows of a stream, from its parts in turn."""
    from datasets import load_dataset

    parts = [
        iter(load_dataset(**{"path": source.repository, **arguments}, split=source.splits[split], streaming=True))
        for arguments in source.arguments
    ]
    while parts:
        for part in list(parts):
            row = next(part, None)
            if row is None:
                parts.remove(part)
            elif source.column not in row:
                raise ValueError(f"its columns are {', '.join(row)}, not {source.column}")
            else:
                yield row[source.column]


def _check_connection(repository: str, revision: str = "main") -> None:
    """Ask the hub for a dataset: without a network this fails at once, where a download is retried for half a minute.

    Raises:
        OSError: or `huggingface_hub.errors.HTTPError`, if the hub does not answer.
    """
    from huggingface_hub import HfApi

    HfApi().dataset_info(repository, revision=revision, timeout=10)
