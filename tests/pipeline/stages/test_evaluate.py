"""What a run measures, and what a further start of it measures again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import slimplus
from slimplus.data.windows import evaluation_windows
from slimplus.models.loading import ModelSource
from slimplus.pipeline.stages import evaluate
from slimplus.report.page import render
from slimplus.report.run_files import read_runs
from slimplus.run_dir.directory import RunDirectory
from tests.support.models import ModelMaker
from tests.support.recipes import Arguments
from tests.support.runs import measured_run, read_metrics, run


@pytest.fixture(scope="module")
def further(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second text."""
    file = tmp_path_factory.mktemp("further") / "further.txt"
    file.write_text(text_file.read_text()[20_000:40_000])
    return file


@pytest.fixture(scope="module")
def several(finished: Path, arguments: Arguments, further: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was started again with two further texts."""
    folder = tmp_path_factory.mktemp("several") / "run"
    shutil.copytree(finished, folder)
    texts = f"[{further}, {{path: offline, windows: 3, sequence_length: 48, stride: 16, bos: window}}]"
    run(arguments(folder, f"evaluation.texts={texts}"))
    return folder


def test_further_texts_are_measured_as_the_first_one_is(finished: Path, several: Path, further: Path) -> None:
    before, metrics = read_metrics(finished), read_metrics(several)
    first, second, third = metrics["texts"]
    for key in ("perplexity", "divergence"):
        assert metrics[key] == before[key] == first[key]
    assert metrics["evaluation"] == before["evaluation"]
    assert (second["text"], second["windows"], second["sequence_length"], second["stride"]) == (str(further), 2, 64, 64)
    assert (third["text"], third["windows"], third["stride"], third["bos"]) == ("offline", 3, 16, "window")
    assert (second["predictions"], third["predictions"]) == (2 * 63, 47 + 2 * 16)
    for row in (second, third):
        assert row["divergence"]["kl_max"] > row["divergence"]["kl_mean"] > 0


def test_the_figures_are_those_of_the_whole_models(several: Path, further: Path, make_model: ModelMaker) -> None:
    source = ModelSource(str(make_model("llama")), dtype="float32")
    tokens = evaluation_windows(further.read_text(), source.tokenizer(), 2, 64).tokens
    with torch.no_grad():
        full = source.model()(input_ids=tokens).logits.double().log_softmax(-1)[:, :-1]
        packed = slimplus.load(several / "packed", dtype=torch.float32, keep_dense=True)
        quantized = packed(input_ids=tokens).logits.double().log_softmax(-1)[:, :-1]
    row = read_metrics(several)["texts"][1]
    for name, found in (("full", full), ("quantized", quantized)):
        expected = (-found.gather(-1, tokens[:, 1:, None]).mean()).exp()
        assert row["perplexity"][name] == pytest.approx(float(expected), rel=1e-4)
    agreement = (full.argmax(-1) == quantized.argmax(-1)).double().mean()
    assert row["divergence"]["top_token_agreement"] == pytest.approx(float(agreement), abs=1e-9)
    whole = (full.exp() * (full - quantized)).sum(-1)
    assert row["divergence"]["kl_max"] <= float(whole.max()) * 1.001
    assert row["divergence"]["kl_mean"] == pytest.approx(float(whole.mean()), rel=0.1)  # of 64 tokens and the rest


def test_one_table_stands_in_the_summary_the_report_and_the_card(several: Path) -> None:
    row = read_metrics(several)["texts"][2]
    figures = f"{row['perplexity']['quantized']:.2f}", f"{row['divergence']['kl_p99']:.4g}"
    found = (*figures, "3 × 48, stride 16, BOS in each")
    for page in ("summary.txt", "report.html", "packed/README.md"):
        for cell in found:
            assert cell in (several / page).read_text(encoding="utf-8"), page


def test_what_is_measured_is_not_measured_again(
    several: Path, arguments: Arguments, further: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(several, folder)
    measured = []
    real = evaluate.perplexity

    def count(model: object, tokens: torch.Tensor, description: str, *rest: object) -> float:
        measured.append((description, len(tokens)))
        return real(model, tokens, description, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "perplexity", count)
    run(arguments(folder, f"evaluation.texts=[{{path: {further}, windows: 1}}, {further}]"))
    # The second text is known, but the predictions in its place are of another one, so the full model runs again.
    full, packed = f"full precision, {further}", f"packed, {further}"
    assert measured == [(full, 1), (full, 2), (packed, 1)]
    kept = read_metrics(several)["texts"][1]
    assert read_metrics(folder)["texts"][2] == kept


def test_a_run_of_an_earlier_version_keeps_its_figures(finished: Path, arguments: Arguments, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    metrics = read_metrics(folder)
    del metrics["texts"]
    for key in ("stride", "bos", "predictions"):
        del metrics["evaluation"][key]
    directory = RunDirectory(folder)
    directory.open()
    directory.write("metrics.json", metrics)
    assert render(read_runs([folder]))
    seconds = metrics["seconds"]
    metrics = measured_run(arguments(folder))
    assert metrics["texts"] == read_metrics(finished)["texts"]
    assert {key: metrics["seconds"][key] for key in ("full_precision", "packed")} == {
        key: seconds[key] for key in ("full_precision", "packed")
    }
