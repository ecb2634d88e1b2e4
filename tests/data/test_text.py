"""Texts: local files, Python's documentation, and the hub's data sets."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import datasets
import huggingface_hub
import pytest
from jinja2 import TemplateError

from slimplus.data import formats
from slimplus.data.hub import HUB_SOURCES, HubSource, HubStream, Split
from slimplus.data.text import TextError, check_source, load_text, read_text, share_samples

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
    assert "offline or a local .txt, .jsonl, .json, .csv, .parquet file" in message
    assert cause == "ConnectError"


DOWNLOADS = {name: source for name, source in HUB_SOURCES.items() if isinstance(source, HubSource)}
STREAMS = {name: source for name, source in HUB_SOURCES.items() if isinstance(source, HubStream)}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("name", "source"), DOWNLOADS.items(), ids=DOWNLOADS)
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
    rows = [{source.column: text, "url": "where from"} for text in texts]
    write = {".gz": write_jsonl_gz, ".parquet": write_parquet}[file.suffix]
    write(file, rows)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kept = texts[: source.rows.get(split)]
    assert load_text(name, split) == source.separator.join(kept)


def write_out(messages: Sequence[Mapping[str, Any]]) -> str:
    """Stands in for a chat template."""
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("name", "source"), STREAMS.items(), ids=STREAMS)
def test_hub_stream_is_read_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: HubStream, split: Split
) -> None:
    parts: list[str] = []

    def load_dataset(path: str, split: str, streaming: bool, **arguments: Any) -> Iterator[dict[str, Any]]:
        assert streaming
        assert path == source.repository or source.repository in arguments["data_files"]
        part = len(parts)
        parts.append(split)
        for number in count():
            text = f"{split} {part} {number}"
            chat = [{"role": "user", "content": text}]
            yield {"url": "where from", source.column: chat if source.column == "messages" else text}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *_, **__: None))
    text = read_text(name, split, render_chat=write_out)
    assert parts == [source.splits[split]] * len(source.arguments)
    assert len(text.documents) == source.rows[split] <= 5000
    after = 5000 if split == "evaluation" and source.splits["calibration"] == source.splits[split] else 0
    number, part = divmod(after, len(source.arguments))
    start = "<user>" if source.column == "messages" else ""
    assert text.documents[0] == f"{start}{source.splits[split]} {part} {number}"
    monkeypatch.setattr(datasets, "load_dataset", None)  # as without a network
    assert read_text(name, split, render_chat=write_out).documents == text.documents


@pytest.mark.parametrize("name", ["t.txt", "T.TXT", "t.txt.gz", "t.jsonl", "t.JSONL", "t.jsonl.gz", "t.json", "t.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = {"txt": "Hello", "jsonl": '{"text": "Hello"}', "json": '[{"text": "Hello"}]', "csv": "id,text\n1,Hello"}
    data = b"\xef\xbb\xbf" + content[name.lower().split(".")[1]].encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert load_text(str(tmp_path / name), "calibration") == "Hello"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "lines.json", "rows.json.gz", "rows.csv", "rows.parquet"])
def test_a_column_is_read_whatever_the_others_hold(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [{"body": f'line "{i}"\n, é {i}', "date": None, "text": "no"} for i in range(3000)]
    rows[-1]["date"] = "2026-01-01T00:00:00"
    path = tmp_path / name
    if name == "rows.csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name == "rows.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        lines = name in ("rows.jsonl", "lines.json")
        rows[1]["date"] = {"late": [1]}
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    documents = read_text(str(path), "calibration", "body").documents
    assert documents == [row["body"] for row in rows]


def test_rows_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a piece cuts through."""
    path = tmp_path / "rows.json"
    rows = [{"text": f'é {i} \\" [{{]}}'} for i in range(20)]
    for content in (json.dumps(rows), json.dumps(rows, indent=2), "\n".join(map(json.dumps, rows))):
        path.write_text(content)
        for size in (1, 2, 7, 100):
            monkeypatch.setattr(formats, "CHUNK", size)
            assert load_text(str(path), "calibration") == "\n\n".join(row["text"] for row in rows)
    path.write_text(json.dumps(rows)[:-1])
    with pytest.raises(TextError, match="cannot be read as json.*the list has no end"):
        load_text(str(path), "calibration")


def test_half_a_character_of_json_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}')
    assert load_text(str(path), "calibration") == "a \ufffd b \U0001f600"


CHAT = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "id": 1},
        {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]},
    ],
)
def test_chats_are_written_out_by_the_template(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [row, row])
    text = read_text(path, "calibration", render_chat=write_out)
    assert text.joined == "<user>Name a colour.<assistant>Red." * 2
    with pytest.raises(TextError, match=r"holds chats, and the model's tokenizer has no chat template"):
        read_text(path, "calibration")


def test_a_template_may_refuse_a_chat(tmp_path: Path) -> None:
    def refuse(_: object) -> str:
        raise TemplateError("roles must alternate")

    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(TextError, match=r"chat template refuses a chat of .*chat\.jsonl.*roles must alternate"):
        read_text(path, "calibration", render_chat=refuse)


def test_a_folder_is_read_in_order_without_what_is_hidden_or_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b/2.txt": "two",
        "a.TXT": "one",
        "notes.md": "no",
        ".git/x.txt": "no",
        ".x.txt": "no",
    }.items():
        (tmp_path / name).write_text(content)
    write_jsonl(tmp_path / "c.jsonl", [{"text": "three"}, {"text": "four"}])
    assert load_text(str(tmp_path), "calibration") == "one\n\ntwo\n\nthree\n\nfour"
    (tmp_path / "b" / "bad.jsonl").write_text("{")
    with pytest.raises(TextError, match=r"b/bad\.jsonl' cannot be read as json"):
        load_text(str(tmp_path), "calibration")


def test_no_more_is_read_than_is_taken(tmp_path: Path) -> None:
    rows = [{"text": f"{i:04d}" * 25} for i in range(100)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\nno JSON")
    assert read_text(str(path), "calibration", limit=1000).documents == [row["text"] for row in rows[:11]]
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("".join(f"{number}{i:02d}\n" for i in range(100)))
    path.unlink()
    text = read_text(str(tmp_path), "calibration", limit=800)
    assert [document[0] for document in text.documents] == ["0", "1", "2", "3"]
    assert [len(document) for document in text.documents] == [204] * 4  # to the end of the next line


def test_shares_of_a_mix_add_up() -> None:
    assert share_samples(128, [3, 1]) == [96, 32]
    assert share_samples(10, [1, 1, 1]) == [4, 3, 3]
    assert share_samples(1, [1, 2]) == [0, 1]
