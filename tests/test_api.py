"""The Python API: what `slimplus` offers, and `slimplus.quantize` as a library's user meets it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import slimplus
from slimplus import api
from slimplus.recipe.parsing import load_recipe, recipe_file
from slimplus.recipe.schema import Recipe
from tests.support.models import ModelMaker
from tests.support.processes import ROOT
from tests.support.recipes import SMALL

DEMO = "smollm2_135m_2bit"


def small(make_model: ModelMaker, text_file: Path, **keys: Any) -> dict[str, Any]:
    """What `quantize` takes for the run of the fixture `finished`."""
    values = dict(key.split("=", 1) for key in SMALL)
    overrides = {key: yaml.safe_load(value) for key, value in values.items() if not key.startswith("model.")}
    texts = {"data.calibration.path": text_file, "data.evaluation.path": str(text_file)}
    return {"model": make_model("llama"), "recipe": DEMO, **overrides, **texts, **keys}


def refused(*arguments: Any, **keys: Any) -> str:
    with pytest.raises(slimplus.InputError) as caught:
        slimplus.quantize(*arguments, **keys)
    return str(caught.value)


# What there is


def test_every_name_is_there_and_documented() -> None:
    assert slimplus.__all__ == sorted(slimplus.__all__)
    assert dir(slimplus) == slimplus.__all__
    for name in slimplus.__all__:
        assert getattr(slimplus, name) is getattr(slimplus, name)
        if name != "__version__":
            assert f"`{name}`" in (slimplus.__doc__ or ""), name
            assert getattr(slimplus, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'slimplus' has no attribute 'quantise'"):
        _ = slimplus.quantise  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(slimplus.__file__).read_text())
    (checking,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.name: node.module for node in checking.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == slimplus._HOMES
    assert {"__version__", *seen} == set(slimplus.__all__)
    assert (ROOT / "slimplus/py.typed").is_file()


def test_the_import_is_light() -> None:
    code = (
        "import slimplus, sys; sys.exit(' '.join({'torch', 'transformers', 'pydantic', 'lightning'} & {*sys.modules}))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.stderr.strip() == ""


def test_the_version_is_one() -> None:
    assert f'\nversion: "{slimplus.__version__}"\n' in (ROOT / "CITATION.cff").read_text()
    released = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == slimplus.__version__


# Which recipe runs


def test_a_recipe_is_a_name_a_file_or_an_object(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe_file(DEMO).read_text())
    named = api._resolve(None, DEMO, {"run_dir": "x"})
    assert named == load_recipe([f"recipe={DEMO}", "run_dir=x"])
    assert api._resolve(None, str(file), {"run_dir": "x"}) == named
    assert api._resolve(None, file, {"run_dir": "x"}) == named
    assert api._resolve(None, file, {}).run_dir == "runs/mine"
    assert api._resolve(None, named, {}) == named
    changed = api._resolve(None, named, {"quantization.bits": 3, "seed": 5})
    assert (changed.quantization.bits, changed.seed, changed.run_dir) == (3, 5, "x")
    assert named.quantization.bits == 2
    with pytest.raises(slimplus.InputError, match="recipe: expected a name, the path of a YAML file or a Recipe, got"):
        api._resolve(None, {"seed": 1}, {})  # type: ignore[arg-type]


def test_another_model_leaves_nothing_of_the_recipes_own() -> None:
    own = api._resolve(None, DEMO, {})
    assert (own.model.gguf_file, own.model.dtype) == ("SmolLM2-135M-Instruct.Q4_1.gguf", "bfloat16")
    assert api._resolve(own.model.path, DEMO, {}).model == own.model
    other = api._resolve(Path("some/model"), DEMO, {})
    assert other.model.model_dump(exclude_defaults=True) == {"path": "some/model"}
    assert other.quantization == own.quantization
    given = api._resolve("some/model", DEMO, {"model.gguf_file": "model.gguf", "model.dtype": "float16"})
    assert given.model.model_dump(exclude_defaults=True) == {
        "path": "some/model",
        "gguf_file": "model.gguf",
        "dtype": "float16",
    }
    assert api._resolve("some/model", "llama7b_2bit", {}).model.config is None
    assert api._resolve("some/model", own, {}).model == other.model
    with pytest.raises(slimplus.InputError, match="model.path: the model is given twice; leave one out"):
        api._resolve("some/model", DEMO, {"model.path": "another"})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("quantization.widths", (1, 2), [1, 2]),
        ("quantization.widths", [1, 3], [1, 3]),
        ("training.width_rates", {1: 0.5, 3: 2}, {1: 0.5, 3: 2.0}),
        ("training.patience", None, None),
        ("resume.force", True, True),
        ("resume", "never", "never"),
        ("quantization.percdamp", 1e-3, 1e-3),
        ("training.weight_decay", 0, 0.0),
        ("run_dir", Path("null"), "null"),
        ("data.calibration.path", "1e3.txt", "1e3.txt"),
        ("model.revision", "1234567", "1234567"),
        ("model.revision", "no", "no"),
        (
            "model.config",
            {"model_type": "llama", "layer_types": (Path("x"),)},
            {"model_type": "llama", "layer_types": ["x"]},
        ),
    ],
)
def test_values_are_pythons_and_not_yaml(key: str, value: object, expected: object) -> None:
    recipe: Any = api._resolve("some/model", DEMO, {key: value})
    for part in {"resume": "resume.start"}.get(key, key).split("."):
        recipe = getattr(recipe, part)
    assert recipe == expected
    assert type(recipe) is type(expected)


# What is refused


@pytest.mark.parametrize(
    ("overrides", "written"),
    [
        ({"quantization.bits": "two"}, ["quantization.bits=two"]),
        ({"quantization.bits": 9}, ["quantization.bits=9"]),
        ({"bits": 3}, ["bits=3"]),
        ({"quantization.method": "awq", "seed": -1}, ["quantization.method=awq", "seed=-1"]),
        ({"seed.x": 1}, ["seed.x=1"]),
        ({"training": 3}, ["training=3"]),
        ({"model.path": "nowhere"}, ["model.path=nowhere", "model.gguf_file=null"]),
        ({"data.calibration.path": "wikitex2"}, ["data.calibration.path=wikitex2"]),
        ({"data.samples": 10**9}, ["data.samples=1000000000"]),
    ],
)
def test_the_sentences_are_those_of_the_command_line(
    overrides: dict[str, Any], written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from slimplus.cli.main import main

    assert main(["train", f"recipe={DEMO}", *written]) == 2
    said = capsys.readouterr().err.strip()
    assert refused(recipe=DEMO, **overrides, **({"model.gguf_file": None} if "model.path" in overrides else {})) == said


def test_bad_input_is_told_before_pytorch_is_loaded() -> None:
    code = (
        "import slimplus, sys\n"
        "try: slimplus.quantize('nowhere', recipe='smollm2_135m_2bit')\n"
        "except slimplus.InputError as error: sys.stdout.write(f'{error} {\"torch\" in sys.modules}')"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("model.path: nowhere does not exist; give a folder, a hub id")
    assert process.stdout.endswith("False")


def test_a_dry_run_makes_no_checkpoint() -> None:
    said = "dry_run: quantize makes a checkpoint; for a plan alone run slimplus train dry_run=true"
    assert refused(recipe="llama7b_2bit", dry_run=True) == said


def test_several_processes_need_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's `__main__` has no file, nor has that of `python -c`."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    said = refused(recipe=DEMO, **{"trainer.devices": 2, "training.batch_size": 2})
    assert said.startswith("trainer.devices: 2 processes need a script that each of them can run, and a notebook or an")
    monkeypatch.setenv("LOCAL_RANK", "1")  # as one of those that torchrun has started
    recipe = api._resolve(None, DEMO, {"trainer.devices": 2})
    api._check_processes(recipe)


# What comes of it


def test_it_makes_what_the_command_line_makes(
    make_model: ModelMaker, text_file: Path, finished: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    run_dir = tmp_path / "api"
    result = slimplus.quantize(**small(make_model, text_file, run_dir=run_dir))
    assert torch.equal(torch.get_rng_state(), state)
    assert result.path == run_dir / "packed"
    for name in ("model.safetensors", "config.json"):
        assert (result.path / name).read_bytes() == (finished / "packed" / name).read_bytes()
    assert result.metrics == json.loads((run_dir / "metrics.json").read_text())
    assert result.metrics["perplexity"].keys() == {"full", "quantized"}
    model = result.load(dtype=torch.float32)
    assert model.dtype == torch.float32
    with pytest.raises(AttributeError, match="cannot assign to field"):
        result.path = tmp_path  # type: ignore[misc]

    written = (result.path / "model.safetensors").stat().st_mtime_ns
    again = slimplus.quantize(**small(make_model, text_file, run_dir=run_dir))
    assert again.metrics["perplexity"] == result.metrics["perplexity"]
    assert (result.path / "model.safetensors").stat().st_mtime_ns == written
    said = refused(**small(make_model, text_file, run_dir=run_dir, **{"quantization.bits": 3}))
    assert "quantization.bits" in said
    assert "give another run_dir" in said


def test_a_relative_run_dir_may_be_left(
    make_model: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cheap = {"quantization.method": "rtn", "quantization.allocation": "uniform"}
    result = slimplus.quantize(**small(make_model, text_file, run_dir="here", **cheap))
    monkeypatch.chdir("/")
    assert result.path == tmp_path / "here/packed"
    assert result.load() is not None


TWO_PROCESSES = """
import json, os, sys
import slimplus

keys = json.loads(sys.argv[1])
for bits in (2, 3):
    result = slimplus.quantize(run_dir=f"{keys['folder']}/{bits}", **keys["quantize"] | {"quantization.bits": bits})
    rank, perplexity = os.environ.get("LOCAL_RANK", "0"), result.metrics["perplexity"]["quantized"]
    sys.stdout.write(f"\\nrank {rank}: {bits} bits, {perplexity}, {result.path.exists()}\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["python", "torchrun"])
def test_a_script_runs_once_in_each_of_two_processes(
    make_model: ModelMaker, text_file: Path, tmp_path: Path, starter: str
) -> None:
    """They end well, and a script may quantize more than once."""
    devices = {"trainer.accelerator": "cpu", "trainer.devices": 2, "quantization.method": "gptq"}
    given = {
        key: str(value) if isinstance(value, Path) else value for key, value in small(make_model, text_file).items()
    }
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    keys = json.dumps({"folder": str(tmp_path), "quantize": given | devices})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [sys.executable, *(torchrun if starter == "torchrun" else []), script, keys],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    said = sorted(re.findall(r"^rank (\d): (\d) bits, ([\d.]+), True$", process.stdout, re.MULTILINE))
    assert [(rank, bits) for rank, bits, _ in said] == [("0", "2"), ("0", "3"), ("1", "2"), ("1", "3")]
    assert [perplexity for rank, _, perplexity in said if rank == "0"] == [
        perplexity for rank, _, perplexity in said if rank == "1"
    ]


def test_a_recipe_object_runs(make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    keys = small(make_model, text_file, run_dir=tmp_path / "run", **{"quantization.method": "rtn"})
    model, name = keys.pop("model"), keys.pop("recipe")
    recipe = api._resolve(model, name, keys)
    assert isinstance(recipe, Recipe)
    result = slimplus.quantize(recipe=recipe)
    assert result.metrics["method"] == "rtn"
