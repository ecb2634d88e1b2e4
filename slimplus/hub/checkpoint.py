"""Writing and loading of packed checkpoints, in the layout of the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, is_accelerate_available

from slimplus.hub.checks import check_architecture, check_quantization
from slimplus.hub.contents import HUB_ID, METHOD
from slimplus.hub.transformers_quantizer import SlimplusConfig, SlimplusQuantizer  # registers with transformers
from slimplus.models.auto_class import auto_class
from slimplus.nn import prepare_inference
from slimplus.nn.dequantize import replace_packed_layers
from slimplus.utils.errors import InputError

Model = TypeVar("Model", bound=nn.Module)

SHARD_BYTES = 2 * 2**30  # of tensors in a file, held in memory until it is written
# Arguments of `from_pretrained` that say where the files are.
LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Errors of transformers and PyTorch for unexpected values in config.json.
LOADING_ERRORS = (
    *(ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, StrictDataclassError),
)


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: PretrainedConfig,
    quantization: SlimplusConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    generation: GenerationConfig | None,
    model_card: str,
    files: Iterable[Path] = (),
) -> int:
    """Write a checkpoint that `from_pretrained` loads.

    Args:
        folder: folder of the checkpoint, which is emptied if it exists.
        tensors: tensors by their names in the model's state dict, in the order in which they are written; one shard of
            them is held in memory.
        config: configuration of the full-precision model.
        quantization: which layers are packed, and how.
        tokenizer: tokenizer to save beside the weights, if there is one.
        generation: generation settings to save beside the weights, if there are any.
        model_card: content of README.md.
        files: further files to copy, such as those of an image processor.

    Returns:
        The size of all the tensors, in bytes.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = write_shards(folder, tensors)
    packed_config = type(config).from_dict(config.to_dict())
    packed_config.quantization_config = quantization.to_dict()
    packed_config.save_pretrained(folder)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if generation is not None:
        generation.save_pretrained(folder)
    (folder / "README.md").write_text(model_card)
    for file in folder.glob("*.safetensors"):  # safetensors lets nobody but the owner read them
        shutil.copymode(folder / "README.md", file)
    return size


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write the tensors into shards, and return their size in bytes.

    A shard's name holds the number of shards, which is known only at the end: shards are renamed then.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        try:
            save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        except SafetensorError as error:  # an error of the system, such as a full disk, whose number is in the text
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
    """Load a packed checkpoint, ready to run fast on the device that it is loaded to.

    `AutoModelForCausalLM.from_pretrained`, or `AutoModelForImageTextToText` for a model that reads images, loads packed
    checkpoints as well where slimplus is installed or has been imported; it has no `fuse` and `keep_dense`, and the
    first forward prepares the layers.

    Only safetensors files are read, and no code of a checkpoint is run.

    Args:
        path: folder or hub id of the checkpoint.
        fuse: whether layers that read the same input (q, k and v; gate and up) are multiplied in one launch.
        keep_dense: whether dequantized weights are kept. Many rows at once, and float32, are then fast on a CPU, but
            take as much memory as the model before it was quantized.
        **arguments: further arguments of `from_pretrained`.

    Raises:
        InputError: if there is no complete packed checkpoint, or it is damaged.
    """
    model = _read(path, arguments)
    for fused in tqdm(prepare_inference(model, fuse, keep_dense), "Preparing layers", leave=False, disable=None):
        if fused.supports(model.dtype, rows=1):
            fused.warm_up(model.dtype)
    return model


def dequantize(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Replace the packed layers of a model by ordinary ones, in place, and return the model.

    Ordinary layers take as much memory as before the model was quantized. They can be trained, resized and saved, and
    an adapter that was trained on packed layers can be merged into them:

    ```python
    merged = slimplus.dequantize(adapted).merge_and_unload()
    ```

    Args:
        model: a model that `load`, `from_pretrained` or `quantize_module` returned, or an adapter's model around it.
        dtype: dtype of the weights; None takes that of the model's other tensors, float32 if there are none. Weights
            are exact in float32.
    """
    other = (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    dtype = dtype or next(other, torch.float32)
    module: Any
    for module in list(model.modules()):
        if isinstance(getattr(module, "hf_quantizer", None), SlimplusQuantizer):
            module.dequantize(dtype)
    replace_packed_layers(model, dtype)
    return model


def _read(path: str | Path, arguments: dict[str, Any]) -> PreTrainedModel:
    """Check config.json, load the model with transformers, and raise InputError for anything that is wrong."""
    if not Path(path).is_dir() and not re.fullmatch(HUB_ID, str(path)):
        raise InputError(f"{path} does not exist; give the folder of a packed checkpoint, or a hub id org/name")
    try:
        location = {key: value for key, value in arguments.items() if key in LOCATION_ARGUMENTS}
        config, _ = PretrainedConfig.get_config_dict(path, **location)
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
            raise InputError(f"{path} is not a packed slimplus checkpoint; load it with transformers")
        check_quantization(quantization)
        check_architecture(config, quantization["modules"])
        device = None if is_accelerate_available() else _only_device(arguments.get("device_map"))
        fixed: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
        fixed |= {"device_map": None} if device else {}
        loaded: Any = auto_class(config).from_pretrained(path, **{"trust_remote_code": False} | arguments | fixed)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{path} cannot be loaded: {kind}{error}") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers gives them random values
        raise InputError(f"{path} lacks {len(missing)} tensors, {missing[0]} among them; export or download it again")
    if unexpected := sorted(found["unexpected_keys"]):  # what they hold would be lost
        raise InputError(
            f"{path} holds {unexpected[0]}, which is no tensor of the model that its config.json describes; export or "
            "download it again"
        )
    return cast(PreTrainedModel, model.to(device) if device else model)


def _only_device(device_map: Any) -> torch.device | None:
    """Return the device that `device_map` names, if it names one; transformers needs accelerate even for that."""
    several = ("auto", "balanced", "balanced_low_0", "sequential")
    one = isinstance(device_map, str | int | torch.device) and device_map not in several
    return torch.device(device_map) if one else None
