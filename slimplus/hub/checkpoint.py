"""Packed checkpoints on disk, laid out as the hub does it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from slimplus.hub.checks import check_architecture, check_quantization
from slimplus.hub.contents import METHOD
from slimplus.hub.transformers_quantizer import SlimplusConfig, register
from slimplus.nn import prepare_inference
from slimplus.utils.errors import InputError

SHARD_BYTES = 2 * 2**30  # what is held in memory while a checkpoint is written
# Of the arguments of `from_pretrained`, those that say where the files are.
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What transformers and PyTorch raise for values in config.json that they do not expect.
FROM_STRANGERS = (
    *(ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, StrictDataclassError),
)


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: PretrainedConfig,
    quantization: SlimplusConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    model_card: str,
) -> int:
    """Write a checkpoint that `from_pretrained` loads.

    Args:
        folder: where to; emptied if it exists.
        tensors: names as in the model's state dict, in the order in which they are written; one shard is in memory.
        config: of the full-precision model.
        quantization: which layers are packed, and how.
        tokenizer: saved beside the weights.
        generation: saved beside the weights.
        model_card: content of README.md.

    Returns:
        Bytes of all the tensors.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = _write_shards(folder, tensors)
    packed_config = type(config).from_dict(config.to_dict())
    packed_config.quantization_config = quantization.to_dict()
    packed_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation is not None:
        generation.save_pretrained(folder)
    (folder / "README.md").write_text(model_card)
    for file in folder.glob("*.safetensors"):  # which safetensors lets nobody but their owner read
        shutil.copymode(folder / "README.md", file)
    return size


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Greedy shards; their names hold their number, which is known only at the end."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        try:
            save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one, comes without its number
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), str(error), str(folder)) if number else error from error
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
            pending_bytes = 0
        pending[name] = tensor.contiguous()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    stem, suffix = SAFE_WEIGHTS_NAME.split(".")
    names = [
        SAFE_WEIGHTS_NAME if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        for number in range(1, len(shards) + 1)
    ]
    for number, name in enumerate(names):
        (folder / f"{number}.part").rename(folder / name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, members in zip(names, shards, strict=True) for tensor in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))
    return total


def load(path: str | Path, *, fuse: bool = True, keep_dense: bool = False, **arguments: Any) -> PreTrainedModel:
    """Load a packed checkpoint: a folder or a hub id; ready to run fast on the device it is loaded to.

    `AutoModelForCausalLM.from_pretrained` does the same once `slimplus` has been imported, but for the options here,
    and that the first forward makes ready. Without that import transformers does not know the method, and gives a
    model with random linear layers.

    Args:
        path: folder or hub id.
        fuse: whether layers that read the same input (q, k and v; gate and up) are multiplied in one launch.
        keep_dense: whether dequantized weights are kept: many rows at once, and float32, are fast on a CPU then, at the
            memory of the model before it was quantized.
        arguments: passed on to `from_pretrained`.

    Raises:
        InputError: if what is there is no whole checkpoint of this package. Only safetensors files are read, and no
            code that a checkpoint brings along is run.
    """
    register()
    model = _read(path, arguments)
    for fused in tqdm(prepare_inference(model, fuse, keep_dense), "Preparing layers", leave=False, disable=None):
        if fused.supports(model.dtype, rows=1):
            fused.warm_up(model.dtype)
    return model


def _read(path: str | Path, arguments: dict[str, Any]) -> PreTrainedModel:
    try:
        where = {key: value for key, value in arguments.items() if key in WHERE}
        config, _ = PretrainedConfig.get_config_dict(path, **where)
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
            raise InputError(f"{path} is not a packed slimplus checkpoint; load it with transformers")
        check_quantization(quantization)
        check_architecture(config, quantization["modules"])
        fixed: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **{"trust_remote_code": False} | arguments | fixed)
    except InputError:
        raise
    except FROM_STRANGERS as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{path} cannot be loaded: {kind}{error}") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers gives them random values
        raise InputError(f"{path} lacks {len(missing)} tensors, {missing[0]} among them; download it again")
    return cast(PreTrainedModel, model)
