"""Texts: local files, Python's documentation, and the hub's data sets."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import datasets
import huggingface_hub
import pytest

from slimplus.data.text import HUB_SOURCES, HubSource, Split, TextError, check_source, load_text

SPLITS: tuple[Split, ...] = get_args(Split)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def write_jsonl_gz(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


ROW_FILES = pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", write_jsonl), (".parquet", write_parquet)], ids=["jsonl", "parquet"]
)
WriteRows = Callable[[Path, list[dict[str, Any]]], str]


@pytest.mark.parametrize("content", ["a\n\n\n b  \n", " = Title = \n \n no newline at the end", "ünïcode 漢字\n"])
def test_txt_is_read_whole_and_exactly(tmp_path: Path, content: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content, encoding="utf-8", newline="")
    for split in SPLITS:
        assert load_text(str(path), split) == content


def test_line_ends_are_normalized(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"one\r\n\r\ntwo\r\n")
    assert load_text(str(path), "evaluation") == "one\n\ntwo\n"


@ROW_FILES
def test_rows_are_joined_with_an_empty_line(tmp_path: Path, suffix: str, write: WriteRows) -> None:
    rows: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(["one\n", None, "", "four"])]
    assert load_text(write(tmp_path / f"rows{suffix}", rows), "calibration") == "one\n\n\n\n\nfour"


@ROW_FILES
def test_missing_column_names_those_present(tmp_path: Path, suffix: str, write: WriteRows) -> None:
    path = write(tmp_path / f"rows{suffix}", [{"id": 1, "body": "one"}])
    with pytest.raises(TextError, match=r"data\.calibration\.path.*'text'.*'id', 'body'"):
        load_text(path, "calibration")


@ROW_FILES
def test_column_must_hold_strings(tmp_path: Path, suffix: str, write: WriteRows) -> None:
    path = write(tmp_path / f"rows{suffix}", [{"text": 1}])
    with pytest.raises(TextError, match="holds int values"):
        load_text(path, "calibration")


def test_a_changed_file_is_read_anew_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for content in ("first", "other"):  # of equal length and written within one tick of the clock
        path.write_text(content)
        os.utime(path, (0, 0))
        assert load_text(str(path), "calibration") == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_is_not_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a1.txt").write_text("wrong")
    (tmp_path / "a[1].txt").write_text("right")
    assert load_text(str(tmp_path / "a[1].txt"), "calibration") == "right"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin1.txt", b"caf\xe9", "cannot be read as text"),
        ("broken.jsonl", b'{"text": \n', "cannot be read as json"),
        ("newline.jsonl", b"\n", "holds no text"),
        ("broken.parquet", b"not parquet", "cannot be read as parquet"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("empty.txt", b"", "holds no text"),
        ("notes.md", b"text", "unknown text source"),
    ],
)
def test_unusable_file_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        load_text(str(path), "evaluation")
    assert str(caught.value).startswith("data.evaluation.path: ")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["no/such/file.txt", "wikitext", ""])
def test_wrong_source_is_rejected_without_heavy_imports(path: str) -> None:
    with pytest.raises(TextError, match=r"data\.calibration\.path.*wikitext2.*offline.*\.parquet"):
        check_source(path, "calibration")


def test_checking_a_source_imports_nothing_heavy() -> None:
    code = (
        "import sys; from slimplus.data.text import check_source; check_source('c4', 'evaluation'); "
        "sys.exit(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_offline_parts_share_nothing() -> None:
    evaluation, calibration = load_text("offline", "evaluation"), load_text("offline", "calibration")
    paragraphs = [[p.strip() for p in text.split("\n\n")] for text in (evaluation, calibration)]
    assert not set(paragraphs[0]) & set(paragraphs[1])
    assert all(len(part) == len(set(part)) for part in paragraphs)


def test_offline_text_is_the_same_in_another_process() -> None:
    code = "import sys; from slimplus.data.text import load_text; sys.stdout.write(load_text('offline', sys.argv[1]))"
    for split in SPLITS:
        command = [sys.executable, "-X", "utf8", "-c", code, split]
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stdout.decode() == load_text("offline", split)


def test_offline_text_is_long_enough() -> None:
    # At 4.0 characters a token, as SmolLM2's tokenizer makes of this text: 16 windows of 2048, and 64 of 512.
    assert len(load_text("offline", "evaluation")) > 16 * 2048 * 4.0
    assert len(load_text("offline", "calibration")) > 64 * 512 * 4.0


@pytest.mark.parametrize("name", HUB_SOURCES)
def test_hub_source_without_network(name: str) -> None:
    code = (
        "import sys; from slimplus.data.text import TextError, load_text\n"
        "try: load_text(sys.argv[1], 'calibration')\n"
        "except TextError as error: sys.stdout.write(f'{error}|{type(error.__cause__).__name__}')"
    )
    # A port nobody listens on: the request is refused at once, and must not be repeated for half a minute.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=20,
    )
    message, cause = done.stdout.split("|")
    assert message.startswith(f"data.calibration.path: '{name}' could not be downloaded from the hub")
    assert "offline or a local .txt, .jsonl, .parquet file" in message
    assert cause == "ConnectError"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("name", "source"), HUB_SOURCES.items(), ids=HUB_SOURCES)
def test_hub_source_is_read_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: HubSource, split: Split
) -> None:
    commit = tmp_path / f"datasets--{source.repository.replace('/', '--')}"
    reference = commit / "refs" / source.revision
    reference.parent.mkdir(parents=True)
    reference.write_text("0" * 40)
    file = commit / "snapshots" / ("0" * 40) / source.files[split]
    file.parent.mkdir(parents=True)
    texts = [f"{split} {i}" for i in range(2000)] + [""]
    rows = [{source.text_format.column: text, "url": "where from"} for text in texts]
    write = {".gz": write_jsonl_gz, ".parquet": write_parquet}[file.suffix]
    write(file, rows)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kept = texts[: source.rows.get(split)]
    assert load_text(name, split) == source.text_format.separator.join(kept)
