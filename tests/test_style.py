"""The rules of the house that ruff does not know: who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "slimplus").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "train.py"])
MAX_LINES, MAX_LOOSE = 400, 3

FLOORS = (
    {"train", "cli"},
    {"api"},
    {"pipeline"},
    {"run_dir", "report"},
    {"recipe"},
    {"blockwise", "evaluation"},
    {"training", "hub"},
    {"models"},
    {"quantization", "nn"},
    {"distributed", "data", "kernels"},
    {"format", "utils"},
)
"""The packages from top to bottom. Data flows one way: a package imports itself, its own floor and those below.

Algorithms stand below the recipe: they take tensors and small configurations, never the recipe.
"""
FLOOR = {package: number for number, packages in enumerate(FLOORS) for package in packages}


def module_name(file: Path) -> str:
    """Return the dotted name under which a file is imported: kernels/ is slimplus.kernels."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] in ("slimplus", "train") else ("slimplus", *parts))


MODULES = {module_name(file): file for file in FILES}


def imported(name: str, is_package: bool, source: str) -> Iterator[str]:
    """Yield what a module imports of slimplus, each by its dotted name: `slimplus.format.affine.quantize`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) + is_package - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (each for each in names if each.startswith("slimplus."))


def package(name: str) -> str:
    """Return the part of a dotted name that has a floor."""
    return name.removeprefix("slimplus.").split(".")[0]


def forbidden(name: str, is_package: bool, source: str) -> list[str]:
    """Return the imports of a module that look up the floors."""
    return [
        f"{name} imports {target}"
        for target in imported(name, is_package, source)
        if name != "slimplus" and FLOOR[package(target)] < FLOOR[package(name)]
    ]


def graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Return, of each module, those it imports, wherever in the file it does so."""
    edges = {}
    for name, file in modules.items():
        targets = imported(name, file.name == "__init__.py", file.read_text(encoding="utf-8"))
        found = {target if target in modules else target.rpartition(".")[0] for target in targets}
        edges[name] = {target for target in found if target in modules and target != name}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for target in sorted(edges[name]):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_imports_go_down_the_floors(file: Path) -> None:
    assert forbidden(module_name(file), file.name == "__init__.py", file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("slimplus.quantization.gptq", "from slimplus.training.fit import Fit"),
        ("slimplus.quantization.gptq", "from ..models.loading import load"),
        ("slimplus.quantization.gptq", "from .. import recipe"),
        ("slimplus.format.planes", "from slimplus.quantization.gptq import quantize"),
        ("slimplus.utils.errors", "from slimplus.nn import PackedLinear"),
        ("slimplus.nn.packed_linear", "def late():\n    import slimplus.training.fit"),
        ("slimplus.kernels.packed_matmul", "from slimplus import nn"),
        ("slimplus.data.windows", "from slimplus.models.loading import load"),
        ("slimplus.training.fit", "import slimplus.pipeline as p"),
        ("slimplus.training.fit", "from slimplus.recipe.schema import Recipe"),
        ("slimplus.hub", "from slimplus import pipeline"),
        ("slimplus.pipeline.run", "from slimplus.cli.main import main"),
    ],
)
def test_a_forbidden_import_is_seen(name: str, source: str) -> None:
    assert forbidden(name, name == "slimplus.hub", source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("slimplus.quantization.gptq", "import torch\nfrom slimplus.format.affine import quantize"),
        ("slimplus.quantization.gptq", "from .salience import salience\nfrom . import linear"),
        ("slimplus.nn.packed_linear", "from slimplus.kernels import packed_matmul"),
        ("slimplus.training.fit", "from slimplus.models.loading import load"),
        ("slimplus.data.windows", "from slimplus.utils.errors import InputError"),
        ("slimplus.pipeline.run", "from slimplus.recipe.schema import Recipe\nfrom slimplus import training, hub"),
    ],
)
def test_an_allowed_import_is_not(name: str, source: str) -> None:
    assert forbidden(name, False, source) == []


def test_no_file_imports_itself_through_others() -> None:
    edges = {name: targets - {"slimplus"} for name, targets in graph(MODULES).items()}
    assert circle(edges) == []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_few_modules_are_loose() -> None:
    loose = [file.name for file in (ROOT / "slimplus").glob("*.py") if file.name != "__init__.py"]
    assert len(loose) <= MAX_LOOSE


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
