"""Figures of the shipped recipes: what runs measured, and what the recipes of large models need.

    python -m benchmarks.recipes runs/NAME [RUN_DIR ...]   # into benchmarks/results/recipes.json, a row a run
    python -m benchmarks.recipes --needs NAME [NAME ...]   # into the third line of recipes/NAME.yaml

A row holds what the run's metrics.json holds: figures, machine, versions and commit. What a recipe needs of memory and
disk is what `dry_run` says. Hours are those that `benchmarks/block_shapes.py` measured for a block of LLaMA's shape, by
the number of weights in the blocks.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from slimplus.models.architectures import find_blocks
from slimplus.models.loading import ModelSource, build_on_meta
from slimplus.pipeline.plan import dry_run
from slimplus.recipe.parsing import load_recipe, recipe_file
from slimplus.recipe.schema import Recipe
from slimplus.utils.files import write_atomic

RESULTS = Path(__file__).resolve().parent / "results"
FIGURES = (
    *("perplexity", "divergence", "average_bits", "packed_share", "bits_per_weight", "outer_bits", "size_bytes"),
    *("full_size_bytes", "seconds", "peak_memory_bytes", "peak_device_memory_bytes", "end_to_end", "precision"),
    "evaluation",
)
"""Entries of metrics.json that a row keeps."""

BLOCK_WEIGHTS = {"llama_7b": 202_383_360, "llama2_70b": 855_654_400}
"""Shape in block_shapes.json → number of weights in one of its blocks."""

PEAK = re.compile(r"peak memory estimate +(\S+ \S+) main memory; on a GPU, if there is one, (\S+ \S+)")
DISK = re.compile(r"disk +(\S+ \S+) in run_dir")


def row(recipe: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a run.

    Args:
        recipe: name of the recipe.
        metrics: the content of the run's metrics.json.

    Raises:
        ValueError: if the run is not finished.
    """
    if "quantized" not in metrics["perplexity"]:
        raise ValueError(f"the run of {recipe} is not finished; start it again with the same command")
    machine = metrics["machine"] | metrics["libraries"]
    return {"recipe": recipe, "machine": machine} | {key: metrics[key] for key in FIGURES if key in metrics}


def needs(recipe: Recipe) -> str:
    """Return what a recipe with `model.config` needs, as the third line of its file."""
    plan = dry_run(recipe)
    peak, disk = PEAK.search(plan), DISK.search(plan)
    assert peak is not None
    assert disk is not None
    line = f"# needs {peak[2]} of GPU memory, {peak[1]} of main memory, {disk[1]} of disk beside the model"
    hours = block_hours(recipe)
    return line if hours is None else f"{line}; about {hours:.1f} hours for the blocks on an H100"


def block_hours(recipe: Recipe) -> float | None:
    """Return the hours of the block-wise stage on the GPU of block_shapes.json; None for blocks of another kind.

    Sensitivities, the end-to-end stage and loading come on top.
    """
    assert recipe.model.config is not None
    blocks = find_blocks(build_on_meta(ModelSource.config_of(recipe.model.config)))
    weights = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    if any("experts" in name for name, _ in blocks.named_parameters()):
        return None
    measured = json.loads((RESULTS / "block_shapes.json").read_text())
    shape = min(BLOCK_WEIGHTS, key=lambda name: abs(BLOCK_WEIGHTS[name] - max(weights)))
    (seconds,) = (row for row in measured["rows"] if row["shape"] == shape)
    data, settings = recipe.data, measured["settings"]
    windows = data.samples * data.sequence_length / (settings["samples"] * settings["sequence_length"])
    over_windows = windows * (3 * seconds["seconds_outputs"] + seconds["seconds_calibration"])
    steps = windows * settings["samples"] * recipe.training.epochs * seconds["seconds_step"]
    return float((over_windows + steps) / 3600 * sum(weights) / BLOCK_WEIGHTS[shape])


def main() -> None:
    """Parse the arguments, and add the rows or write the needs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs of shipped recipes, runs/NAME")
    parser.add_argument("--needs", nargs="+", default=[], metavar="NAME", help="recipes of large models")
    given = parser.parse_args()
    results = RESULTS / "recipes.json"
    rows = json.loads(results.read_text())["rows"]
    added = [row(run.name, json.loads((run / "metrics.json").read_text())) for run in given.runs]
    if added:
        kept = [known for known in rows if known not in added]
        write_atomic(results, json.dumps({"rows": [*kept, *added]}, indent=2) + "\n")
    for name in given.needs:
        command, about, _, *others = recipe_file(name).read_text(encoding="utf-8").split("\n")
        write_atomic(
            Path(str(recipe_file(name))), "\n".join([command, about, needs(load_recipe([f"recipe={name}"])), *others])
        )


if __name__ == "__main__":
    main()
