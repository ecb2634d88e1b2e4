"""Tasks of lm-eval: what is loaded, what is scored, and what its own command line says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimplus.cli.main import main
from slimplus.evaluation.tables import task_cells
from slimplus.evaluation.tasks import PAPER, TaskConfig, _expanded, load_tasks, score
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker
from tests.support.processes import ROOT
from tests.support.tasks import QUESTIONS, write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_names_are_written_out(folder: Path) -> None:
    files = [str(folder / "choice.yaml"), str(folder / "page.yaml")]
    assert list(_expanded(["mmlu", "paper", str(folder)])) == ["mmlu", *PAPER, *files]


def test_wrong_task_files_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    file = folder / "choice.yaml"
    (tmp_path / "template.yaml").write_text(file.read_text().replace("{{question}}", "{{missing.foo}}"))
    (tmp_path / "same.yaml").write_text(file.read_text())
    with pytest.raises(InputError, match=r"template\.yaml cannot be loaded \(UndefinedError"):
        load_tasks(TaskConfig([str(tmp_path / "template.yaml")]))
    with pytest.raises(InputError, match=r"same\.yaml holds a task called 'local_choice', and so does another one"):
        load_tasks(TaskConfig([str(file), str(tmp_path / "same.yaml")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no \.yaml task file; give a folder with some"):
        load_tasks(TaskConfig([str(tmp_path / "empty")]))


def test_the_scores_are_those_of_the_models_own_probabilities(folder: Path, make_model: ModelMaker) -> None:
    path = make_model("llama")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    rows = {(row["task"], row["metric"]): row for row in score(model, tokenizer, load_tasks(TaskConfig([str(folder)])))}
    hits = 0
    for question, choices, label in QUESTIONS:
        chances = []
        for choice in choices:
            tokens = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
            start = len(tokenizer(question)["input_ids"])
            with torch.no_grad():
                found = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
            chances.append(float(found[start - 1 :].sum()))
        hits += chances.index(max(chances)) == label
    accuracy = rows["local_choice", "acc"]
    assert accuracy["value"] == pytest.approx(hits / len(QUESTIONS))
    assert accuracy["stderr"] is not None
    assert (accuracy["examples"], accuracy["num_fewshot"]) == (len(QUESTIONS), 0)
    assert rows["local_page", "bits_per_byte"]["value"] > 0
    limited = load_tasks(TaskConfig([str(folder / "choice.yaml")], limit=2))
    told: list[tuple[int, int]] = []
    assert {row["examples"] for row in score(model, tokenizer, limited, lambda *count: told.append(count))} == {2}
    requests = sum(len(choices) for _, choices, _ in QUESTIONS[:2])
    assert told == [(answered, requests) for answered in range(1, requests + 1)]


def test_the_tokens_to_read_are_counted_as_far_as_they_are_asked(folder: Path) -> None:
    choice = str(folder / "choice.yaml")
    every, two, shown = (
        load_tasks(TaskConfig([choice], **given)).tokens for given in ({}, {"limit": 2}, {"num_fewshot": 2})
    )
    assert 0 < two < every
    assert shown == 3 * every


def test_the_fingerprint_is_of_what_is_asked(folder: Path, tmp_path: Path) -> None:
    tasks = [str(folder / "choice.yaml")]
    first = load_tasks(TaskConfig(tasks)).fingerprint
    assert load_tasks(TaskConfig(tasks)).fingerprint == first
    assert load_tasks(TaskConfig(tasks, limit=3)).fingerprint != first
    other = write_tasks(tmp_path)
    lines = (other / "choice.jsonl").read_text().splitlines(keepends=True)
    (other / "choice.jsonl").write_text("".join(lines[:-1]))
    assert load_tasks(TaskConfig([str(other / "choice.yaml")])).fingerprint != first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no_such.yaml cannot be loaded"),
        ("task: [", "wrong.yaml cannot be loaded"),
        (
            "task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: ./none.jsonl}}\ntest_split: test\n",
            "wrong",
        ),
    ],
)
def test_a_wrong_task_file_is_one_sentence(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / ("no_such.yaml" if text is None else "wrong.yaml")
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        load_tasks(TaskConfig([str(file)]))
    assert str(caught.value).startswith("evaluation.tasks: ")
    assert "check the file and the data that it names" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_a_hub_out_of_reach_and_an_unknown_name_are_sentences() -> None:
    """Slow, since lm-eval reads thousands of files to know its tasks."""
    with pytest.raises(InputError, match=r"evaluation\.tasks: piqa cannot be loaded .*run once with a network"):
        load_tasks(TaskConfig(["paper"]))
    with pytest.raises(InputError, match="lm-eval has no task 'pica'; give paper, a name that"):
        load_tasks(TaskConfig(["pica"]))


def test_evaluate_asks_both_models(
    folder: Path, make_model: ModelMaker, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--against", str(make_model("llama")), "--tasks", str(folder), "--json", str(file)]
    assert main(["evaluate", str(packed), *arguments]) == 0
    found = json.loads(file.read_text())
    assert found["texts"] == []
    assert set(found["tasks"]["scores"]) == {"against", "checkpoint"}
    lines = task_cells(found["tasks"]["scores"])
    assert lines[0][-2:] == ["against", "checkpoint"]
    assert [line[0] for line in lines[1:]] == ["local_choice", "local_choice", "local_page", "local_page"]
    said = capsys.readouterr().out
    for line in lines[1:]:
        assert line[-1] in said
        assert line[-2] in said


@pytest.mark.slow
def test_the_harnesses_own_command_line_says_the_same(folder: Path, packed: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main(["evaluate", str(packed), "--tasks", str(folder), "--json", str(file)]) == 0
    ours = {(r["task"], r["metric"]): r for r in json.loads(file.read_text())["tasks"]["scores"]["checkpoint"]}
    tasks = [
        "--tasks",
        "local_choice,local_page",
        "--include_path",
        str(folder),
        "--output_path",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, "-c", "import slimplus; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"]
    options = ["--model", "hf", "--model_args", f"pretrained={packed}", "--batch_size", "8", "--device", "cpu"]
    done = subprocess.run(
        [*command, *options, *tasks],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    for (task, metric), row in ours.items():
        assert results[task][f"{metric},none"] == row["value"], (task, metric)
        if row["stderr"] is not None:
            assert results[task][f"{metric}_stderr,none"] == row["stderr"]
