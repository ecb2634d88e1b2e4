"""Run a function once a module has been imported, whoever imports it and whenever.

`importlib` has no such hook. A finder in front of `sys.meta_path` asks the others for the module, and lets a thin
loader stand in for the module's own one until the module has run.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, function: Callable[[], object]) -> None:
    """Call `function` after each import of the module `name`, and at once if it has been imported already.

    Nothing is imported by this. The finder stays in `sys.meta_path`, since removing one while another thread imports
    would make that thread pass over the next one.

    Args:
        name: dotted name of the module.
        function: called without arguments, perhaps more than once; what it raises is raised by the import.
    """
    sys.meta_path.insert(0, _Finder(name, function))
    if name in sys.modules:
        function()


class _Finder:
    """Finds one module by the other finders, and has a function called once the module has run."""

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self.name, self.function = name, function
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec with a loader that calls the function; None for any other module."""
        if fullname != self.name or getattr(self._searching, "now", False):  # another finder that asks all finders
            return None
        self._searching.now = True
        try:
            others = [each for each in sys.meta_path if each is not self and hasattr(each, "find_spec")]
            found = (finder.find_spec(fullname, path, target) for finder in others)
            spec = next((each for each in found if each is not None), None)
        finally:
            self._searching.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self.function)  # type: ignore[assignment] # in all that importlib asks
        return spec


class _Loader:
    """Stands in for a module's own loader, which has every attribute but the one below."""

    def __init__(self, loader: Any, function: Callable[[], object]) -> None:
        self._loader, self._function = loader, function

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own loader back, run it, and call the function."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._function()
