"""A function is called once a module has been imported, and the module does not notice."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from slimplus.utils.import_hook import after_import

NAME = "module_to_import"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On `sys.path`, with a module in it; the finders are put back afterwards."""
    (tmp_path / f"{NAME}.py").write_text("import sys\nANSWER = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    sys.modules.pop(NAME, None)


def test_it_is_called_after_the_import_and_finds_the_module_whole(folder: Path) -> None:
    seen: list[int] = []
    after_import(NAME, lambda: seen.append(sys.modules[NAME].ANSWER))
    assert seen == []
    importlib.import_module(NAME)
    assert seen == [42]
    importlib.import_module(NAME)
    assert seen == [42]


def test_it_is_called_at_once_for_a_module_that_is_there(folder: Path) -> None:
    module = importlib.import_module(NAME)
    seen: list[object] = []
    after_import(NAME, lambda: seen.append(sys.modules[NAME]))
    assert seen == [module]


def test_the_module_keeps_its_own_loader(folder: Path) -> None:
    after_import(NAME, lambda: None)
    found = importlib.util.find_spec(NAME)  # without an import
    assert found is not None
    assert found.loader is not None
    assert found.loader.get_source(NAME) == (folder / f"{NAME}.py").read_text()  # type: ignore[attr-defined]
    module = importlib.import_module(NAME)
    assert type(module.__loader__) is SourceFileLoader
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert "ANSWER" in inspect.getsource(module)
    assert module.__file__ == str(folder / f"{NAME}.py")


def test_two_hooks_and_a_finder_that_asks_all_finders_get_along(folder: Path) -> None:
    class Asks:
        """As wrapt's finder does."""

        def __init__(self) -> None:
            self.asking = False

        def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
            if self.asking or name != NAME:
                return None
            self.asking = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.asking = False

    seen: list[str] = []
    after_import(NAME, lambda: seen.append("first"))
    sys.meta_path.insert(0, Asks())
    after_import(NAME, lambda: seen.append("second"))
    assert importlib.import_module(NAME).ANSWER == 42
    assert sorted(seen) == ["first", "second"]


def test_a_reload_calls_it_again(folder: Path) -> None:
    seen: list[int] = []
    after_import(NAME, lambda: seen.append(1))
    importlib.reload(importlib.import_module(NAME))
    assert seen == [1, 1]


def test_a_module_that_cannot_be_imported_is_not_announced(folder: Path) -> None:
    (folder / f"{NAME}.py").write_text("raise ValueError('broken')\n")
    seen: list[int] = []
    after_import(NAME, lambda: seen.append(1))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            importlib.import_module(NAME)
    assert seen == []
    after_import("a_module_that_is_not_there", lambda: seen.append(1))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("a_module_that_is_not_there")
    assert seen == []


def test_threads_that_import_at_once_all_find_it_called(folder: Path) -> None:
    (folder / f"{NAME}.py").write_text("import time\ntime.sleep(0.05)\nANSWER = 42\n")
    called = threading.Event()
    after_import(NAME, called.set)
    start, found = threading.Barrier(8), list[bool]()

    def work() -> None:
        start.wait()
        importlib.import_module(NAME)
        found.append(called.is_set())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_other_imports_pass_by(folder: Path) -> None:
    (folder / "another.py").write_text("")
    seen: list[int] = []
    after_import(NAME, lambda: seen.append(1))
    importlib.import_module("another")
    sys.modules.pop("another")
    assert seen == []
