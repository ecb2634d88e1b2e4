"""Tasks and prompts in a run: both models are asked once, and the checkpoint is the same as without."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from slimplus.pipeline.stages import ask
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.preflight import check_inputs, check_shares
from slimplus.recipe.section import RecipeError
from slimplus.report.page import answers_side_by_side, task_table
from slimplus.report.run_files import read_runs
from tests.support.recipes import Arguments
from tests.support.runs import packed_weights, read_metrics, run
from tests.support.tasks import write_tasks

PROMPTS = 'evaluation.prompts=["The city <b>", "x = "]'


@pytest.fixture(scope="module")
def asked(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run with tasks and prompts, and the arguments of its recipe."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("asked")
    given = arguments(folder / "run", f"evaluation.tasks=[{write_tasks(folder)}]", PROMPTS, "evaluation.new_tokens=8")
    run(given)
    return folder / "run", given


def test_questions_change_no_bit_of_the_checkpoint(finished: Path, asked: tuple[Path, list[str]]) -> None:
    expected, found = packed_weights(finished), packed_weights(asked[0])
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_both_models_are_asked(asked: tuple[Path, list[str]]) -> None:
    metrics = read_metrics(asked[0])
    for name in ("full", "quantized"):
        rows = {(row["task"], row["metric"]): row for row in metrics["tasks"]["scores"][name]}
        assert rows["local_choice", "acc"]["stderr"] > 0
        assert ("local_page", "bits_per_byte") in rows
        assert len(metrics["generation"][name]["answers"]) == 2
        assert metrics["generation"][name]["length"] <= 8
    assert metrics["tasks"]["scores"]["full"] != metrics["tasks"]["scores"]["quantized"]
    assert {"full_precision_answers", "packed_answers"} <= metrics["seconds"].keys()


def test_scores_and_answers_stand_in_the_summary_the_report_and_the_card(asked: tuple[Path, list[str]]) -> None:
    folder = asked[0]
    (found,) = read_runs([folder])
    table = task_table([found])
    for page in ("summary.txt", "report.html", "packed/README.md"):
        text = (folder / page).read_text(encoding="utf-8")
        assert all(cell in text for line in table for cell in line), page
        assert "distinct-2" in text
    (prompt, answers), _ = answers_side_by_side(found)
    assert prompt == "The city <b>"
    assert list(answers) == ["full precision", "quantized"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "The city &lt;b&gt;" in page
    assert '<section id="answers">' in page


def test_what_was_asked_is_not_asked_again(asked: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, given = asked
    before = read_metrics(folder)
    questions: list[str] = []

    def count(model: Any, tokenizer: Any, *rest: Any) -> list[Any]:
        questions.append(type(rest[0]).__name__)
        return []

    monkeypatch.setattr(ask, "score", count)
    run(given)
    assert questions == []
    after = read_metrics(folder)
    assert (after["tasks"], after["generation"]) == (before["tasks"], before["generation"])
    run([*given, "evaluation.limit=2"])
    assert questions == ["LoadedTasks", "LoadedTasks"]
    run([*given, "evaluation.tasks=[]", "evaluation.prompts=[]"])
    assert not {"tasks", "generation"} & read_metrics(folder).keys()


def test_several_processes_and_a_missing_library_are_sentences(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(arguments(tmp_path / "run", "evaluation.tasks=[paper]"))
    with pytest.raises(RecipeError, match=r"evaluation\.tasks: one process asks them, and this job has 2"):
        check_shares(recipe, 2)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(RecipeError) as caught:
        check_inputs(recipe)
    assert str(caught.value) == "evaluation.tasks: lm_eval is not installed; pip install 'slimplus[tasks]'"
