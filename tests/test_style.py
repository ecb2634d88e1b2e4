"""The rules of the house that ruff does not know: who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "slimplus").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "train.py"])
MAX_LINES = 400

# Data flows one way. A layer may import itself and these; parts that stand above all layers are not listed.
GROUND = {"errors", "files"}  # know nobody
LAYERS: dict[str, set[str]] = {
    **{part: set() for part in GROUND},
    "manifest": GROUND,
    "signals": set(),
    "kernels": {"quantization"},
    "quantization": {"kernels"},
    "nn": {"kernels", "quantization"} | GROUND,
    "models": {"nn"} | GROUND,
    "data": {"nn"} | GROUND,
    "training": {"kernels", "quantization", "nn", "models", "data", "manifest", "signals"} | GROUND,
}
SEES_THE_RECIPE = {
    "config",
    "reading",
    "preflight",
    "fingerprint",
    "commands",
    "cli",
    "run",
    "job",
    "shapes",
    "assembly",
    "pipeline",
    "train",
}
SEES_THE_PIPELINE = {"cli", "train"}


def module_name(file: Path) -> str:
    """The dotted name under which a file is imported: kernels/ is slimplus.kernels."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] in ("slimplus", "train") else ("slimplus", *parts))


def imported(name: str, is_package: bool, source: str) -> Iterator[str]:
    """What a module imports of slimplus, each as the part below it: `quantization.affine`, `config`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) + is_package - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (each.removeprefix("slimplus.") for each in names if each.startswith("slimplus."))


def forbidden(name: str, is_package: bool, source: str) -> list[str]:
    """The imports of a module that the house rules do not allow."""
    part = name.removeprefix("slimplus.").split(".")[0]
    found = []
    for target in imported(name, is_package, source):
        goal = target.split(".")[0]
        outside = part in LAYERS and goal not in LAYERS[part] | {part}
        recipe = goal in ("config", "reading", "preflight") and part not in SEES_THE_RECIPE
        pipeline = goal == "pipeline" and part not in SEES_THE_PIPELINE
        if outside or recipe or pipeline:
            found.append(f"{name} imports {target}")
    return found


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_imports_follow_the_layers(file: Path) -> None:
    assert forbidden(module_name(file), file.name == "__init__.py", file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("slimplus.quantization.gptq", "from slimplus.nn import PackedLinear"),
        ("slimplus.quantization.gptq", "from ..nn.packed import PackedLinear"),
        ("slimplus.quantization.gptq", "from .. import config"),
        ("slimplus.quantization.gptq", "from slimplus.errors import InputError"),
        ("slimplus.errors", "from slimplus.nn import PackedLinear"),
        ("slimplus.nn.packed", "def late():\n    import slimplus.training.blocks"),
        ("slimplus.kernels.packed_matmul", "from slimplus import nn"),
        ("slimplus.data.windows", "from slimplus.models.loading import load"),
        ("slimplus.training.blocks", "import slimplus.pipeline as p"),
        ("slimplus.training.blocks", "from slimplus.config import Recipe"),
        ("slimplus.hub", "from slimplus.config import Recipe"),
        ("slimplus.hub", "from slimplus import pipeline"),
        ("slimplus", "from slimplus.config import Recipe"),
    ],
)
def test_a_forbidden_import_is_seen(name: str, source: str) -> None:
    assert forbidden(name, name == "slimplus", source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("slimplus.quantization.gptq", "import torch\nfrom slimplus.quantization.affine import quantize"),
        ("slimplus.quantization.gptq", "from .affine import quantize\nfrom . import salience"),
        ("slimplus.nn.packed", "from slimplus.kernels import packed_matmul"),
        ("slimplus.training.blocks", "from slimplus.models.loading import load"),
        ("slimplus.data.windows", "from slimplus.errors import InputError"),
        ("slimplus.pipeline", "from slimplus.config import Recipe\nfrom slimplus import training, hub"),
    ],
)
def test_an_allowed_import_is_not(name: str, source: str) -> None:
    assert forbidden(name, False, source) == []


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_files_stay_small_quiet_and_let_errors_through(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno}"


@pytest.mark.parametrize("folder", ["kernels", "recipes"])
def test_folders_beside_the_package_are_no_packages(folder: str) -> None:
    """At the top of a checkout they would shadow others, such as the PyPI package `kernels`."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()
