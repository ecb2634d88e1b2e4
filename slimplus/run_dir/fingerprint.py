"""What the results of a run depend on, so that another start does not go on from what was made of something else."""

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

# Keys that may change between the starts of one run: they say where it runs, or what is measured at the end.
FREE_KEYS = (
    *("run_dir", "resume", "dry_run", "data.evaluation", "trainer.checkpoint_seconds"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.offload"),
    "model.revision",  # a name for the commit that `weights_digest` gives
    *("quantization.embedding_bits", "quantization.head_bits"),  # quantized after the blocks
    "end_to_end",  # comes after the blocks, and knows what it was made from
    "training.accumulate_grad_batches",  # in how many parts a device takes its share of a step
)
LIBRARIES = ("torch", "transformers", "lightning", "deepspeed", "safetensors", "tokenizers")
WEIGHTS = ("*.safetensors", "*.gguf", "*.bin")
WHOLE = 2**26  # files up to this size are hashed whole, larger ones by samples
SAMPLE, SAMPLES = 2**16, 256


def digest(content: bytes | str) -> str:
    """Short SHA-256, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def fingerprint(
    recipe: Recipe,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    config: PretrainedConfig,
    precision: str,
) -> dict[str, Any]:
    """All that finished blocks depend on: recipe keys by their names, the rest as hashes."""
    free = FREE_KEYS if recipe.quantization.trains else (*FREE_KEYS, "training")
    keys = {key: value for key, value in flatten(recipe).items() if not key.startswith(free)}
    # What is in a file says more than its path, and the resolved precision more than `auto`.
    keys["data.calibration.path"] = digest(text)
    keys["model.path"] = weights_digest(source)
    keys["trainer.precision"] = precision
    if recipe.quantization.allocation is not None and recipe.quantization.allocates_by == "file":
        keys["quantization.allocation"] = digest(Path(recipe.quantization.allocation).expanduser().read_bytes())
    # Neither where it lies nor what reads it: an upgrade of a library is a warning, see `library_versions`.
    left_out = ("_name_or_path", "transformers_version")
    values = {key: value for key, value in config.to_dict().items() if key not in left_out}
    architecture = json.dumps(values, sort_keys=True, default=str)
    return keys | {"tokenizer": digest(tokenizer_identity(tokenizer)), "model configuration": digest(architecture)}


def weights_digest(source: ModelSource) -> str:
    """What tells the model's weights: the commit on the hub, if `source` is pinned, or a hash of the local files.

    Of a file above 64 MiB, the size and 256 evenly spaced samples of 64 KiB, the first of which holds its header: any
    other training changes every tensor, and 140 GB are sampled in a second.
    """
    folder = Path(source.path)
    if not folder.is_dir():
        return f"{source.path}@{source.revision}"
    files = (
        [folder / source.gguf_file] if source.gguf_file else sorted(p for kind in WEIGHTS for p in folder.glob(kind))
    )
    hashed = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        hashed.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for number in range(SAMPLES if size > WHOLE else 1):
                stream.seek(number * (size - SAMPLE) // (SAMPLES - 1) if size > WHOLE else 0)
                hashed.update(stream.read(SAMPLE if size > WHOLE else WHOLE))
    return hashed.hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Version of every library whose change may change a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`key old -> new` of every key that differs."""
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [f"{key} {before.get(key)} -> {after.get(key)}" for key in keys]
