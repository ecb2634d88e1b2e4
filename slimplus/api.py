"""The Python API: `slimplus.quantize` runs a recipe as `slimplus train` does, and returns what came of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimplus.utils.errors import InputError
from slimplus.utils.requirements import QUANTIZATION, check_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimplus.recipe.schema import Recipe


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized model on disk.

    Attributes:
        path: folder of the packed checkpoint; beside it lie the other files of the run, such as `allocation.json`.
        metrics: the content of `metrics.json`: perplexities, bits, sizes, seconds.
    """

    path: Path
    metrics: Mapping[str, Any]

    def load(self, **arguments: Any) -> PreTrainedModel:
        """Load the packed model; the arguments are those of `slimplus.load`."""
        from slimplus.hub.checkpoint import load

        return load(self.path, **arguments)


def quantize(
    model: str | os.PathLike[str] | None = None,
    *,
    recipe: str | os.PathLike[str] | Recipe,
    run_dir: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> QuantizationResult:
    """Quantize a language model as a recipe says, and write a packed checkpoint.

    ```python
    result = slimplus.quantize(
        "HuggingFaceTB/SmolLM2-135M",
        recipe="smollm2_135m_2bit",
        run_dir="runs/mine",
        **{"quantization.bits": 3, "data.calibration.path": "my_text.txt"},
    )
    result.metrics["perplexity"]  # {"full": …, "quantized": …}
    model = result.load()
    ```

    What `run_dir` already holds of this run is not done again: after an interruption the same call goes on, and after
    the end it gives the same result. The same recipe and keys on the command line are the same run.

    With `trainer.devices` above 1, Lightning starts the script again, from its first line, for every further process,
    and each of them returns the result. So the call must stand in a file that Python runs, not in a notebook, and what
    the script does besides it is done by every process; `LOCAL_RANK` in the environment is `0` or not set in the first
    one.

    Args:
        model: hub id, folder or `package:NAME` of the model to quantize; None for the recipe's own. Where it is another
            one, none of the recipe's section `model` counts: not its GGUF file, revision, dtype or configuration.
        recipe: name of a recipe that comes with the package, path of a YAML file, or a `Recipe`.
        run_dir: folder for all that the run writes; None for the recipe's own, by default `runs/NAME`.
        **overrides: values of the recipe's keys, such as `seed=1` or `**{"quantization.bits": 3}`. They are Python
            values and not read as YAML; `slimplus train --help` lists the keys.

    Returns:
        The checkpoint and the figures.

    Raises:
        InputError: for input the caller can put right, most of it before PyTorch is loaded: the sentences are those of
            the command line.
        TemporaryFailure: for what passes, such as a lost process; the same call goes on.
        Preempted: after SIGTERM or SIGUSR1; the same call goes on.
    """
    check_installed("slimplus.quantize", QUANTIZATION)
    from slimplus.recipe.preflight import check_inputs

    resolved = _resolve(model, recipe, overrides if run_dir is None else overrides | {"run_dir": run_dir})
    if resolved.dry_run:
        raise InputError("dry_run: quantize makes a checkpoint; for a plan alone run slimplus train dry_run=true")
    _check_processes(resolved)
    check_inputs(resolved)

    from lightning.pytorch.utilities.seed import isolate_rng

    from slimplus.pipeline.run import run
    from slimplus.run_dir.directory import RunDirectory

    with isolate_rng():  # the run sets seeds, and the caller's random numbers are to stay as they were
        run(resolved)
    directory = RunDirectory(resolved.run_dir)
    directory.open()
    return QuantizationResult(directory.packed.absolute(), directory.read("metrics.json"))


def _resolve(
    model: str | os.PathLike[str] | None, recipe: str | os.PathLike[str] | Recipe, overrides: Mapping[str, Any]
) -> Recipe:
    """Return the recipe to run.

    Raises:
        InputError: everything that is wrong with it, a sentence a line.
    """
    from slimplus.recipe.parsing import resolve_recipe
    from slimplus.recipe.schema import Recipe

    if model is not None and "model.path" in overrides:
        raise InputError("model.path: the model is given twice; leave one out")
    source = os.fspath(recipe) if isinstance(recipe, os.PathLike) else recipe
    if not isinstance(source, str | Recipe):
        raise InputError(f"recipe: expected a name, the path of a YAML file or a Recipe, got {type(source).__name__}")
    path = None if model is None else os.fspath(model)
    return resolve_recipe(source, {key: _plain(value) for key, value in overrides.items()}, path)


def _plain(value: object) -> object:
    """Return a value as YAML would hold it: a path as text, a tuple as a list, at any depth."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _check_processes(recipe: Recipe) -> None:
    """Check that further processes can be started where the recipe asks for several.

    Raises:
        InputError: in a notebook, in an interactive session, or in code that is in no file.
    """
    devices = recipe.trainer.devices
    started = "LOCAL_RANK" in os.environ  # by torchrun, or by Lightning
    if devices > 1 and not started and not hasattr(sys.modules["__main__"], "__file__"):
        raise InputError(
            f"trainer.devices: {devices} processes need a script that each of them can run, and a notebook or an "
            "interactive session is none; put the call into a file and run that, or give trainer.devices=1"
        )
