"""benchmarks/calibration_text.py: variants of the calibration text, measured alike, row by row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.calibration_text import FULL, MIX, PYTHON, RESULTS, VARIANTS, WIKITEXT, find_texts, table
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker
from tests.support.recipes import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, text_file: Path) -> Path:
    """Two kinds with both parts, and one with a part for calibration alone."""
    folder, text = tmp_path / "texts", text_file.read_text()
    folder.mkdir()
    for number, name in enumerate(("code.calibration", "code.evaluation", "web.calibration", "tales.calibration")):
        (folder / f"{name}.txt").write_text(text[number * 12_000 : (number + 1) * 12_000])
    return folder


def test_nothing_is_measured_on_what_a_variant_is_calibrated_on(folder: Path) -> None:
    texts = find_texts(folder, ["tales"], "train.txt", "test.txt")
    assert list(texts.calibration) == ["code", "web"]
    assert list(texts.evaluation) == ["code", "tales", WIKITEXT, PYTHON]
    assert not {str(file) for file in texts.calibration.values()} & set(texts.evaluation.values())
    with pytest.raises(InputError, match=r"--held-out: .* holds no text called poems; give some of code, tales, web"):
        find_texts(folder, ["poems"], "", "")
    with pytest.raises(InputError, match=r"--texts: .* holds no KIND\.calibration\.txt for a mix"):
        find_texts(folder, ["code", "tales", "web"], "", "")


def test_every_variant_is_a_recipe_of_its_own(folder: Path, text_file: Path, tmp_path: Path) -> None:
    texts = find_texts(folder, ["tales"], str(text_file), str(text_file))
    recipes = {
        name: load_recipe(["recipe=smollm2_135m_2bit", *texts.keys(variant, tmp_path / "mix")])
        for name, variant in VARIANTS.items()
    }
    assert len({recipe.data.model_dump_json() for recipe in recipes.values()}) == len(VARIANTS)
    shares = {source.path: source.weight for source in recipes["WikiText-2, mix and self"].data.calibration.sources}
    codes, web = (str(texts.calibration[kind]) for kind in ("code", "web"))
    assert shares == {str(text_file): 1, "self": 1, codes: 0.5, web: 0.5}
    assert recipes["self, after the mix"].data.generation.prompts == str(tmp_path / "mix")
    assert sorted(file.name for file in (tmp_path / "mix").iterdir()) == ["code.txt", "web.txt"]
    assert {name for variant in VARIANTS.values() for name in variant.weights} == {WIKITEXT, PYTHON, MIX, "self"}


def test_the_table_has_the_lowest_geometric_mean_first() -> None:
    full = {"code": 2.0, "tales": 4.0}
    rows = [
        {"calibration": FULL, "perplexity": full},
        {"calibration": "a", "perplexity": {"code": 8.0, "tales": 4.0}},
        {"calibration": "b", "perplexity": {"code": 2.0, "tales": 9.0}},
    ]
    assert table(rows, full, ["tales"]).splitlines() == [
        "| calibration text | code | tales | geometric mean | of those held out |",
        "| --- | --- | --- | --- | --- |",
        "| b | 1.00 | 2.25 | 1.50 | 2.25 |",
        "| a | 4.00 | 1.00 | 2.00 | 1.00 |",
    ]


@pytest.mark.slow
def test_rows_are_measured_once(folder: Path, text_file: Path, tmp_path: Path, make_model: ModelMaker) -> None:
    results = tmp_path / "results.json"
    command: list[str | Path] = [
        sys.executable,
        ROOT / "benchmarks" / "calibration_text.py",
        f"--texts={folder}",
        "--held-out=tales",
    ]
    command += ["--wikitext2", text_file, text_file, f"--results={results}", f"--runs={tmp_path / 'runs'}"]
    command += ["--samples=4", "--sequence-length=32", "--epochs=1", "--evaluation-windows=2"]
    command += ["--evaluation-length=64", "--variants", "mix", "mix and self, after the mix"]
    keys = [key for key in SMALL if not key.startswith(("data.samples", "data.sequence", "training.epochs"))]
    command += ["--keys", *keys, f"model.path={make_model('llama')}"]
    for _ in range(2):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())["rows"]
    assert [row["calibration"] for row in rows] == [FULL, "mix", "mix and self, after the mix"]
    assert all(list(row["perplexity"]) == ["code", "tales", WIKITEXT, PYTHON] for row in rows)
    assert all(row["machine"]["torch"] and row["machine"]["commit"] for row in rows)
    assert len(done.stdout.splitlines()) == 4, "and no run"


def test_the_documentation_shows_the_measured_rows() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "calibration_text.md").read_text(encoding="utf-8")
    budgets = {json.dumps(row["budget"]) for row in rows}
    assert len(budgets) == 2
    for budget in budgets:
        own = [row for row in rows if json.dumps(row["budget"]) == budget]
        (full,) = [row["perplexity"] for row in own if row["calibration"] == FULL]
        assert table(own, full, ["multilingual", "technical", "tiny"]) in page
