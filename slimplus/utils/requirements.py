"""Whether the libraries that a task needs are installed.

Using a packed checkpoint takes PyTorch, transformers and safetensors alone; making one takes all that pyproject.toml
names. `pip install --no-deps .` beside these three is an installation that loads and generates.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from slimplus.utils.errors import InputError

RECIPE = {"pydantic": "pydantic", "yaml": "pyyaml"}
"""Module → distribution: what reads a recipe."""

REPORT = {"jinja2": "jinja2", "plotly": "plotly", "yaml": "pyyaml"}
"""Module → distribution: what a report is made with."""

QUANTIZATION = RECIPE | {
    "datasets": "datasets",
    "jinja2": "jinja2",
    "lightning": "lightning",
    "plotly": "plotly",
    "rich": "rich",
    "tensorboard": "tensorboard",
    "torchmetrics": "torchmetrics",
}
"""Module → distribution: what every run of a recipe imports. What only some recipes need is looked for with them."""

TASKS = {"lm_eval": "'slimplus[tasks]'"}
"""Module → distribution: what asks tasks."""


def check_installed(purpose: str, modules: Mapping[str, str]) -> None:
    """Check that modules can be imported, without importing them.

    Args:
        purpose: what they are for, the subject of the sentence.
        modules: top-level module → distribution that brings it.

    Raises:
        InputError: naming the distributions that are missing and the command that installs them.
    """
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise InputError(f"{purpose} needs {names}, which {verb} not installed: pip install {' '.join(missing)}")
