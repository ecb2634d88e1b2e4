"""The fingerprint of a run: what its results depend on, so that another start does not go on from other input."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.data.windows import tokenizer_identity
from slimplus.models.loading import ModelSource
from slimplus.recipe.schema import Recipe, flatten
from slimplus.recipe.schema import keys as recipe_keys

# Keys that may change between the starts of one run: they say where it runs, what is measured, or what comes later.
FREE_KEYS = (
    *("run_dir", "resume", "dry_run", "data.evaluation", "evaluation", "trainer.checkpoint_seconds"),
    *("data.cache_gigabytes", "data.cache_dir"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.offload"),
    "trainer.logger",
    "model.revision",  # a name of the commit that `weights_digest` gives
    *("quantization.embedding_bits", "quantization.head_bits"),  # quantized after the blocks
    "end_to_end",  # comes after the blocks; its file holds the hash of what it was made from
    "data.generation.prompts",  # the text's hash tells what they say
    *("training.accumulate_grad_batches", "training.compile"),  # change how a step is computed, not what
    "training.start",  # noted as what `auto` stands for
)
# Keys that earlier versions did not have: left out at their defaults, so that a run begun with one of those goes on.
LATER_KEYS = (
    *("data.calibration.column", "data.bos", "data.separator", "data.generation.prefix_tokens", "data.generation.chat"),
    *("data.generation.temperature", "data.generation.seed", "data.generation.batch_size"),
    *("model.allow_unpacked", "quantization.zero_points", "quantization.per_layer"),
    "quantization.error_propagation",
)
# What earlier versions did without a key, where its default today is another.
EARLIER_VALUES = {"training.start": "calibrated"}
LIBRARIES = ("torch", "transformers", "lightning", "deepspeed", "safetensors", "tokenizers")
LARGEST_WHOLE = 2**26  # bytes; larger files are hashed by samples
SAMPLE_BYTES, SAMPLES = 2**16, 256


def digest(content: bytes | str) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def fingerprint(
    recipe: Recipe,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    config: PretrainedConfig,
    precision: str,
) -> dict[str, Any]:
    """Return what finished blocks depend on: recipe keys with their values, and hashes of what the recipe names.

    Args:
        recipe: the resolved recipe.
        text: what identifies the calibration text, see `texts_identity`.
        tokenizer: the model's tokenizer.
        source: where the full-precision model comes from, pinned to a commit if it is on the hub.
        config: the model's configuration.
        precision: the resolved precision of the job.
    """
    free = FREE_KEYS if recipe.quantization.trains else (*FREE_KEYS, "training")
    fields = recipe_keys()
    keys = {
        key: value
        for key, value in flatten(recipe).items()
        if not key.startswith(free) and not (key in LATER_KEYS and value == fields[key].default)
    }
    # Contents instead of paths, and what `auto` stands for.
    keys["data.calibration.path"] = digest(text)
    keys["model.path"] = weights_digest(source)
    keys["trainer.precision"] = precision
    if recipe.quantization.method == "qat":
        keys["training.start"] = recipe.training_start
    if recipe.quantization.allocation is not None and recipe.quantization.allocates_by == "file":
        keys["quantization.allocation"] = digest(Path(recipe.quantization.allocation).expanduser().read_bytes())
    # The folder does not matter, and other libraries are only warned of, see `library_versions`.
    left_out = ("_name_or_path", "transformers_version")
    values = {key: value for key, value in config.to_dict().items() if key not in left_out}
    architecture = json.dumps(values, sort_keys=True, default=str)
    return keys | {"tokenizer": digest(tokenizer_identity(tokenizer)), "model configuration": digest(architecture)}


def weights_digest(source: ModelSource) -> str:
    """Return what identifies a model's weights: its commit on the hub, or a hash of the local files that are read.

    Files above 64 MiB are hashed by their size and 256 evenly spaced samples of 64 KiB. The first sample holds the
    header, and training changes every tensor, so that other weights give another hash; 140 GB take a second.
    """
    folder = Path(source.path)
    if not folder.is_dir():
        return f"{source.path}@{source.revision}"
    hashed = hashlib.sha256()
    for file in (file for file in source.weight_files() if file.suffix != ".json"):  # an index only names the others
        size = file.stat().st_size
        hashed.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            if size <= LARGEST_WHOLE:
                hashed.update(stream.read(LARGEST_WHOLE))
                continue
            for number in range(SAMPLES):
                stream.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                hashed.update(stream.read(SAMPLE_BYTES))
    return hashed.hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Return the version of Python and of every library that may change a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return `key old -> new` for every key whose value differs."""
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [f"{key} {before.get(key)} -> {after.get(key)}" for key in keys]
