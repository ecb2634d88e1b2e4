"""Quantization with AutoRound, as `benchmarks/quality/run.py` runs it, in a process of its own.

    python -m pip install --no-deps auto-round   # its other requirements come with slimplus
    python benchmarks/quality/autoround.py FOLDER recipe=NAME key=value ...

The recipe gives model, windows, bits, group size, steps a block, windows a step and seed; the rest are AutoRound's
defaults, with zero points. Writes the dequantized weights of the quantized layers, and metrics.json.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from slimplus.data.windows import calibration_windows
from slimplus.models.architectures import quantized_linears
from slimplus.pipeline.prepare import model_source
from slimplus.pipeline.texts import calibration_texts
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.schema import Recipe
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import peak_resident_bytes

SCALE_BITS = 16  # bits of a group's scale; its zero point takes as many bits as a weight


def main() -> None:
    """Quantize as the arguments say, and write the weights and the figures."""
    output, *arguments = sys.argv[1:]
    recipe, folder = load_recipe(arguments), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    weights = linear_weights(quantize(recipe))
    write_atomic(folder / "weights.safetensors", save(weights))
    settings = recipe.quantization
    metrics = {
        "version": version("auto-round"),
        "seconds": {"blocks": time.perf_counter() - start},
        "peak_memory_bytes": peak_resident_bytes(),
        "average_bits": settings.bits,
        "bits_per_weight": settings.bits + (SCALE_BITS + settings.bits) / settings.group_size,
    }
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2))


def quantize(recipe: Recipe) -> PreTrainedModel:
    """Return the recipe's model, the weights of its linear layers replaced by dequantized ones."""
    source, settings, data, training = model_source(recipe), recipe.quantization, recipe.data, recipe.training
    tokenizer = source.tokenizer()
    texts = calibration_texts(recipe, tokenizer)
    tokens = calibration_windows(texts, tokenizer, data.samples, data.sequence_length, recipe.seed).tokens
    model, _ = AutoRound(
        source.model(),
        tokenizer,
        bits=settings.bits,
        group_size=settings.group_size,
        sym=False,
        dataset=[{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in tokens.split(1)],
        nsamples=data.samples,
        seqlen=data.sequence_length,
        iters=training.epochs * data.samples // training.batch_size,
        batch_size=training.batch_size,
        seed=recipe.seed,
        device_map="cpu",
    ).quantize()
    return model


def linear_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of the linear layers in the blocks, by their names in the model."""
    return {f"{name}.weight": layer.weight.detach().contiguous() for name, layer in quantized_linears(model).items()}


if __name__ == "__main__":
    main()
