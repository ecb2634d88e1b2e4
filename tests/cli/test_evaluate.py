"""`slimplus evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimplus.cli.main import main
from slimplus.data.windows import evaluation_windows
from slimplus.models.loading import ModelSource
from tests.support.models import ModelMaker
from tests.support.runs import read_metrics

SIZES = ("--windows", "2", "--sequence-length", "64")


def evaluate(file: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main(["evaluate", *arguments, *SIZES, "--json", str(file)]) == 0
    return json.loads(file.read_text())["texts"]


def test_a_packed_checkpoint_has_the_figures_of_its_run(
    finished: Path,
    make_model: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(finished / "packed"), "--against", str(make_model("llama")), "--dtype", "float32"]
    (row,) = evaluate(tmp_path / "a.json", *arguments, "--text", str(text_file))
    metrics = read_metrics(finished)
    assert row["perplexity"]["against"] == pytest.approx(metrics["perplexity"]["full"], rel=1e-4)
    assert row["perplexity"]["checkpoint"] == pytest.approx(metrics["perplexity"]["quantized"], rel=1e-3)
    assert row["divergence"] == pytest.approx(metrics["divergence"], rel=1e-2)
    said = capsys.readouterr().out
    assert f"{row['perplexity']['checkpoint']:.2f}" in said
    assert f"{row['divergence']['top_token_agreement']:.1%}" in said


def test_a_copy_diverges_by_nothing_on_every_text(make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    model = str(make_model("llama"))
    rows = evaluate(tmp_path / "a.json", model, "--against", model, "--text", str(text_file), "--text", "offline")
    assert [row["text"] for row in rows] == [str(text_file), "offline"]
    for row in rows:
        assert set(row["divergence"].values()) == {0.0, 1.0}
        assert row["divergence"]["kl_max"] == 0
        assert row["divergence"]["top_token_agreement"] == 1
        assert row["perplexity"]["against"] == row["perplexity"]["checkpoint"]


def test_a_model_alone_has_its_perplexity(make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    (row,) = evaluate(tmp_path / "a.json", str(make_model("opt")), "--text", str(text_file), "--dtype", "float32")
    source = ModelSource(str(make_model("opt")), dtype="float32")
    tokens = evaluation_windows(text_file.read_text(), source.tokenizer(), 2, 64).tokens
    with torch.no_grad():
        logits = source.model()(input_ids=tokens).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp()
    assert len(row.pop("fingerprint")) == 64
    assert row == {
        "text": str(text_file),
        "windows": 2,
        "sequence_length": 64,
        "stride": 64,
        "bos": "auto",
        "predictions": 126,
        "perplexity": {"checkpoint": pytest.approx(float(expected), rel=1e-4)},
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["./nowhere"], "./nowhere"),
        (["MODEL", "--text", "./nowhere.txt"], "--text: there is no file './nowhere.txt'"),
        (
            ["MODEL", "--stride", "4096"],
            "--stride: 4096 leaves gaps between windows of 2048 tokens of the text; give at most 2048",
        ),
        (["MODEL", "--bos", "window", "--stride", "2048"], "of 2047 tokens of the text; give at most 2047"),
        (["MODEL", "--json", "nowhere/a.json"], "--json: nowhere is no folder that can be written to"),
        (["MODEL", *SIZES, "--device", "meta"], "--device: meta cannot be used"),
        (["MODEL", "--sequence-length", "1"], "--sequence-length: give at least 2"),
        (["MODEL", "--json", "/"], "--json: / is a folder; give a file"),
        (["MODEL", "--sequence-length", "257"], "--sequence-length: 257 tokens are more than the model takes; give at"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: list[str], sentence: str, make_model: ModelMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("MODEL", str(make_model("llama"))) for word in words]
    capsys.readouterr()  # what making the model wrote
    assert main(["evaluate", *given]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


def test_another_tokenizer_is_refused(
    make_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("llama")
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert main(["evaluate", str(model), "--against", str(tmp_path), *SIZES]) == 2
    assert "makes other tokens of a text than" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_method_whose_library_is_missing_is_one_sentence(
    method: str, make_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["evaluate", str(folder), *SIZES]) == 2
    said = capsys.readouterr().err
    assert f"{folder} needs a library that is not installed" in said
    assert len(said.splitlines()) == 1


def test_a_run_directory_names_its_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished), *SIZES]) == 2
    assert capsys.readouterr().err == f"{finished} is a run directory; give {finished / 'packed'}\n"


def test_the_file_names_the_models_and_their_dtypes(make_model: ModelMaker, tmp_path: Path) -> None:
    model, rows = str(make_model("llama")), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"content": "word " * 40}) + "\n" for _ in range(20)))
    evaluate(tmp_path / "a.json", model, "--text", str(rows), "--column", "content", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "a.json").read_text())["models"] == {
        "checkpoint": {"path": model, "dtype": "bfloat16"}
    }


def test_windows_may_overlap_and_begin_with_the_token(make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    options = ("--text", str(text_file), "--stride", "16", "--bos", "window")
    (row,) = evaluate(tmp_path / "a.json", str(make_model("llama")), *options)
    assert (row["stride"], row["bos"], row["predictions"]) == (16, "window", 63 + 16)
