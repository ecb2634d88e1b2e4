"""What a report shows of a run, read from the files of its directory without weights or PyTorch."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from slimplus.hub.contents import CheckpointContents, read_contents
from slimplus.utils.errors import InputError, named_first_line

FILE, SENSITIVITY = "report.html", "sensitivity.safetensors"
REQUIRED = ("metrics.json", "recipe.yaml", "fingerprint.json")


@dataclass(frozen=True)
class Curve:
    """Loss of one training, epoch by epoch.

    Attributes:
        name: name of the training: `block_007`, or `end_to_end`.
        epochs: numbers of the epochs, from 1.
        losses: mean loss of each.
    """

    name: str
    epochs: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class RunFigures:
    """Figures and texts of one run.

    Attributes:
        name: name of the run on the page.
        folder: the run directory.
        metrics: content of metrics.json.
        recipe: content of recipe.yaml.
        fingerprint: content of fingerprint.json.
        contents: contents of the packed checkpoint, or None if the run has not come so far.
        layers: names of the blocks' layers in the order of the model; empty if the run has not come so far.
        curves: losses of the trainings, in the order of the blocks.
        sensitivity: layer → growth of the loss with all groups at each of `widths`; empty if it was not measured.
        widths: the widths that the sensitivity was measured at.
    """

    name: str
    folder: Path
    metrics: Mapping[str, Any]
    recipe: str
    fingerprint: Mapping[str, Any]
    contents: CheckpointContents | None
    layers: tuple[str, ...]
    curves: tuple[Curve, ...]
    sensitivity: Mapping[str, tuple[float, ...]]
    widths: tuple[int, ...]


def read_runs(folders: Sequence[str | Path]) -> list[RunFigures]:
    """Return the figures of runs, each named by its folder, or by its whole path if two folders have one name.

    Raises:
        InputError: if a folder is no run directory, or a file of it is damaged.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    names = [path.resolve().name for path in paths]
    return [
        _read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def _read_run(folder: Path, name: str) -> RunFigures:
    """Return the figures of one run."""
    for file in REQUIRED:
        if not (folder / file).is_file():
            raise InputError(f"{folder} is no run directory: {file} is missing; give the run_dir of a run")
    packed, allocation = folder / "packed", folder / "allocation.json"
    recipe, widths = _read_recipe(folder / "recipe.yaml")
    bits = _read_json(allocation).get("bits", {}) if allocation.is_file() else {}
    if not isinstance(bits, dict):
        raise damaged(allocation, "bits is no mapping")
    return RunFigures(
        name=name,
        folder=folder,
        metrics=_read_metrics(folder / "metrics.json"),
        recipe=recipe,
        fingerprint=_read_json(folder / "fingerprint.json"),
        contents=read_contents(str(packed)) if (packed / "config.json").is_file() else None,
        layers=tuple(bits),
        curves=tuple(_read_curve(file) for file in sorted((folder / "logs" / "csv").glob("*/metrics.csv"))),
        sensitivity=_read_sensitivity(folder / SENSITIVITY),
        widths=widths,
    )


def damaged(file: Path, problem: object) -> InputError:
    """Return the error of a file that does not hold what a run writes to it."""
    return InputError(f"{file} is damaged ({problem}); start the run again, which writes it again")


def _read_recipe(file: Path) -> tuple[str, tuple[int, ...]]:
    """Return a recipe's text, and the widths that it allows.

    Raises:
        InputError: if the file holds no recipe.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return text, tuple(yaml.safe_load(text)["quantization"]["widths"])
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise damaged(file, named_first_line(error)) from error


def _read_metrics(file: Path) -> dict[str, Any]:
    """Return the figures of a run.

    Raises:
        InputError: if what every run writes at its start is missing.
    """
    metrics = _read_json(file)
    if missing := sorted({"method", "perplexity", "seconds", "events"} - metrics.keys()):
        raise damaged(file, f"{missing[0]} is missing")
    return metrics


def _read_json(file: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

    Raises:
        InputError: if it holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(file, error) from error
    if not isinstance(content, dict):
        raise damaged(file, "it holds no mapping")
    return content


def _read_sensitivity(file: Path) -> dict[str, tuple[float, ...]]:
    """Return the sums over the groups of each layer, `[widths]`, of the tables in a file, if it exists."""
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="numpy") as opened:
            names = [name for name in opened.keys() if name != "channels"]  # noqa: SIM118, no mapping
            return {name: tuple(opened.get_tensor(name).sum(axis=1).tolist()) for name in names}
    except SafetensorError as error:
        raise damaged(file, error) from error


def _read_curve(file: Path) -> Curve:
    """Return the losses in a CSV log, which may end in the middle of a line: logs are not written atomically."""
    losses: dict[int, float] = {}
    with file.open(newline="", encoding="utf-8", errors="replace") as stream, suppress(csv.Error):
        for row in csv.DictReader(stream):
            with suppress(KeyError, TypeError, ValueError):  # a row of another figure, or a part of one
                losses[int(row["epoch"]) + 1] = float(row["loss_epoch"])
    return Curve(file.parent.name, tuple(losses), tuple(losses.values()))


def events(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what went wrong and was put right, each with its place: the run, a block, the end-to-end training."""
    run = [("note", event) for event in metrics["events"]]
    blocks = [
        (f"block {index}", event)
        for index, record in enumerate(metrics.get("blocks", ()))
        for event in record["events"]
    ]
    end_to_end = [("end to end", event) for event in metrics.get("end_to_end", {}).get("events", ())]
    return [*run, *blocks, *end_to_end]
