"""What integer zero points cost, as compressed-tensors and GPTQ need them: perplexity and KL of trained models.

    python -m benchmarks.zero_points [WORK_FOLDER] [MODEL …]

Each model of `MODELS`, all of them unless some are named, is quantized with fractional zero points and with integer
ones. The fractional ones are then also rounded to integers without training. Results go to
benchmarks/results/zero_points.json row by row, where rows of other models stay as they are.

What WORK_FOLDER holds is not made again, and a killed run goes on. SmolLM2 takes hours on two cores.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from benchmarks.experts import train
from slimplus.evaluation.checkpoints import EvaluationConfig, evaluate
from slimplus.pipeline.configs import text_config
from slimplus.pipeline.run import run
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.schema import Recipe
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import commit, describe_machine

RESULTS = Path(__file__).resolve().parent / "results" / "zero_points.json"
LENGTH = 96  # tokens of a window of the small model
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
COMMON = (
    *("recipe=smollm2_135m_2bit", "quantization.allocation=uniform", "quantization.per_layer=true"),
    *("quantization.method=qat", "end_to_end.epochs=0", "trainer.precision=32-true", "evaluation.prompts=[]"),
)
SMALL = (
    *("model.gguf_file=null", "model.dtype=auto", "quantization.group_size=64", "training.epochs=4"),
    *("data.samples=32", f"data.sequence_length={LENGTH}"),
    *("data.evaluation.windows=48", f"data.evaluation.sequence_length={LENGTH}"),
)
SMOLLM2 = (
    *("data.samples=8", "data.sequence_length=256", "training.epochs=2"),
    *("data.evaluation.windows=8", "data.evaluation.sequence_length=256"),
)
MODELS = {"small llama": (SMALL, (2, 3, 4), (0, 1, 2)), "SmolLM2-135M-Instruct": (SMOLLM2, (2, 3, 4), (0, 1, 2))}
"""Name → keys of the recipe, average bits, and seeds."""


def main(work: Path, models: list[str]) -> None:
    """Quantize the models, and write the results."""
    work.mkdir(parents=True, exist_ok=True)
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    rows = {(row["model"], row["bits"], row["seed"]): row for row in kept}
    for name in models:
        for row in rows_of(work, name):
            rows[name, row["bits"], row["seed"]] = row
            result = {"machine": describe_machine(), "sizes": SIZES, "rows": list(rows.values())}
            write_atomic(RESULTS, json.dumps(result, indent=2) + "\n")


def rows_of(work: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of a model, a width and a seed at a time."""
    keys, widths, seeds = MODELS[name]
    texts = small_model(work) if name == "small llama" else []
    for bits in widths:
        for seed in seeds:
            row: dict[str, Any] = {"model": name, "bits": bits, "seed": seed, "keys": [*COMMON, *keys]}
            row["commit"] = commit()
            for kind in ("fractional", "integer"):
                folder = work / f"{name.partition(' ')[0]}_{bits}_{seed}_{kind}"
                own = [f"quantization.bits={bits}", f"seed={seed}", f"quantization.zero_points={kind}"]
                recipe = load_recipe([*COMMON, *keys, *texts, *own, f"run_dir={folder}"])
                run(recipe)
                measured = json.loads((folder / "metrics.json").read_text())
                row["full"] = measured["perplexity"]["full"]
                row[kind] = figures(measured["perplexity"]["quantized"], measured["divergence"])
                if kind == "fractional":
                    row["fractional, then rounded"] = rounded_figures(recipe, folder / "rounded")
            yield row


def small_model(work: Path) -> list[str]:
    """Train the small model on Python's documentation, byte by byte, and return the keys that name it and its texts."""
    text = "\n".join(topics[name] for name in sorted(topics))
    cut = int(0.9 * len(text))
    (work / "train.txt").write_text(text[:cut])
    (work / "held_out.txt").write_text(text[cut:])
    if not (work / "model" / "config.json").is_file():
        train(work / "model", text[:cut], LlamaConfig(**SIZES))
    texts = (f"data.calibration.path={work / 'train.txt'}", f"data.evaluation.path={work / 'held_out.txt'}")
    return [f"model.path={work / 'model'}", *texts]


def figures(perplexity: float, divergence: Mapping[str, float]) -> dict[str, float]:
    """Return what a row holds of a checkpoint: its perplexity, and its divergence from full precision."""
    return {"perplexity": perplexity, "kl_mean": divergence["kl_mean"]}


def rounded_figures(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Return the figures of a run's checkpoint once its zero points are rounded, which is made in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(recipe.run_dir) / "packed", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".zeros")]:
        bits = tensors[name.replace(".zeros", ".group_bits")].int()[:, None]
        steps = 2 ** (8 - bits)
        rounded = torch.round(tensors[name] / steps).clamp(min=0).minimum(2**bits - 1)
        tensors[name] = (rounded * steps).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    texts = [text_config(text) for text in recipe.evaluation_texts.values()]
    model, file = recipe.model.path, recipe.model.gguf_file
    against = f"{model}/{file}" if file else model
    (text,) = evaluate(str(folder), against, EvaluationConfig(texts, None, "cpu", "float32"))["texts"]
    return figures(text["perplexity"]["checkpoint"], text["divergence"])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/zero_points"), sys.argv[2:] or list(MODELS))
