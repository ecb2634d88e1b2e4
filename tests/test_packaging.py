"""The wheel holds what the checkout holds, package, kernels and recipes, and works far from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import slimplus

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import importlib.resources, sys
import slimplus, slimplus.kernels
assert "torch" not in sys.modules, "import slimplus must stay light"
recipes = importlib.resources.files("slimplus.recipes")
names = sorted(entry.name for entry in recipes.iterdir() if entry.is_file())
sys.stdout.write("\\n".join([slimplus.__file__, *slimplus.kernels.__path__, *names]))
"""
STOCK_TOOLS = """
import site, sys
site.addsitedir(sys.argv[1])  # as Python does with site-packages when it starts
assert "slimplus" not in sys.modules
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
tokens = model.generate(inputs=__import__("torch").tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
text = pipeline("text-generation", model=sys.argv[2])("The city", max_new_tokens=8, do_sample=False)
sys.stdout.write(f"{tokens[0].tolist()}\\n{text[0]['generated_text']!r}")
"""


def run(*command: str | Path, folder: Path, pythonpath: Path | None = None) -> str:
    environment = os.environ | ({"PYTHONPATH": str(pythonpath)} if pythonpath else {})
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    run(*pip, target, wheel, folder=target)
    return target


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_recipe_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "slimplus").rglob("*.py")}
    expected |= {f"slimplus/{file.relative_to(ROOT)}" for file in (ROOT / "kernels").rglob("*.py")}
    expected |= {f"slimplus/{file.relative_to(ROOT)}" for file in (ROOT / "kernels/configs").glob("*.json")}
    expected |= {f"slimplus/{file.relative_to(ROOT)}" for file in (ROOT / "recipes").rglob("*.yaml")}
    expected |= {str(file.relative_to(ROOT)) for file in (ROOT / "slimplus/report/templates").iterdir()}
    expected |= {"slimplus/kernels/configs/gpu.json", "slimplus/py.typed"}
    assert names == expected | {f"slimplus-{slimplus.__version__}.data/purelib/slimplus.pth"}


@pytest.mark.slow
def test_an_installed_wheel_works_far_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    lines = run(sys.executable, "-c", PROBE, folder=tmp_path, pythonpath=installed).splitlines()
    assert lines[:2] == [str(installed / "slimplus/__init__.py"), str(installed / "slimplus/kernels")]
    assert lines[2:] == sorted(file.name for file in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.slow
def test_an_editable_wheel_holds_the_startup_file_as_well(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "tests", "docs"))
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_editable(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, folder=source)
    (wheel,) = tmp_path.glob("slimplus-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        startup = archive.read(f"slimplus-{slimplus.__version__}.data/purelib/slimplus.pth")
    assert startup == (ROOT / "slimplus.pth").read_bytes()


def test_tools_that_import_no_slimplus_load_a_packed_checkpoint(packed: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "slimplus.pth", tmp_path)
    tokens, text = run(
        sys.executable, "-c", STOCK_TOOLS, tmp_path, packed, folder=tmp_path, pythonpath=ROOT
    ).splitlines()
    model, tokenizer = slimplus.load(packed), AutoTokenizer.from_pretrained(packed)
    expected = model.generate(inputs=torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert tokens == str(expected[0].tolist())
    prompt = tokenizer("The city", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert text == repr(tokenizer.decode(written[0], skip_special_tokens=True))


def test_the_startup_file_is_silent_where_slimplus_is_gone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "slimplus.pth", tmp_path)
    (tmp_path / "transformers.py").write_text("ANSWER = 42\n")
    probe = "import site, sys; site.addsitedir('.'); import transformers; sys.stdout.write(str(transformers.ANSWER))"
    assert run(sys.executable, "-S", "-c", probe, folder=tmp_path) == "42"


@pytest.mark.slow
def test_the_console_script_is_installed(installed: Path, tmp_path: Path) -> None:
    (entry_points,) = installed.glob("slimplus-*.dist-info/entry_points.txt")
    assert "slimplus = slimplus.cli.main:main" in entry_points.read_text()
    help_text = run(installed / "bin/slimplus", "train", "--help", folder=tmp_path, pythonpath=installed)
    assert "recipe=NAME" in help_text


def test_a_bare_checkout_finds_kernels_and_recipes(tmp_path: Path) -> None:
    lines = run(sys.executable, "-c", PROBE, folder=tmp_path, pythonpath=ROOT).splitlines()
    assert lines[:2] == [str(ROOT / "slimplus/__init__.py"), str(ROOT / "kernels")]
    assert "smollm2_135m_2bit.yaml" in lines


def test_every_dependency_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins: dict[str, str] = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = project["optional-dependencies"].values()
    for requirement in map(Requirement, [*project["dependencies"], *(line for extra in extras for line in extra)]):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier
    assert f"torch=={pins['torch']}" in (ROOT / "Makefile").read_text()
