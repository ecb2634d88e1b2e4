"""Export of a packed checkpoint to GGUF, the format of llama.cpp and Ollama.

A group of up to 4 bits is a row of `Q4_1` blocks: 32 weights share a scale `d` and an offset `m`, both float16, and
stand for `d q + m`. That is the packed format's `(q - zero) scale` with `d = scale`, exactly, and `m = -scale zero`,
rounded once. Blocks know nothing of widths: a layer of 1 to 4 bits mixed is a tensor of one type. `Q5_1` is the same
for 5 bits; wider layers are rounded to `Q8_0`. Matrices that are not packed are `F16`, or a smaller type. The layout is
in `quants.py` of the library gguf, and in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimplus.format.affine import QuantizedWeight, per_column
from slimplus.hub.contents import CheckpointContents, PackedLayer
from slimplus.hub.exported import Exactness, PackedTensors
from slimplus.hub.gguf_tokenizer import add_tokenizer
from slimplus.utils.errors import InputError

Type = gguf.GGMLQuantizationType
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` of config.json → architecture in GGUF."""

BLOCK = 32  # weights of a block in all the types here
DENSE = "`--to dense` holds it"


@dataclass(frozen=True)
class Planned:
    """One tensor of the file before it is written.

    Attributes:
        name: its name in GGUF.
        kind: its type in GGUF.
        shape: shape of the array that is written: elements, or bytes of blocks.
        read: function that returns the array.
    """

    name: str
    kind: Type
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]


def export_gguf(contents: CheckpointContents, file: Path, other_type: str = "f16") -> Exactness:
    """Write a GGUF file, tensor by tensor.

    Args:
        contents: contents of the packed checkpoint.
        file: file to write.
        other_type: name of a type that the library's quantizers write, such as `f16` and `q8_0`, for matrices that
            are not packed: the embedding and the head.

    Raises:
        InputError: if GGUF cannot hold the model, in a sentence that says what can.
        OSError: if the disk is full or cannot be written.
    """
    check_model(contents)
    exactness = Exactness()
    planned = list(_plan(contents, exactness, gguf.GGMLQuantizationType[other_type.upper()]))
    writer = gguf.GGUFWriter(file, ARCHITECTURES[contents.config["model_type"]])
    try:
        _add_metadata(writer, contents)
        exactness.add("tokenizer", *add_tokenizer(writer, contents.folder, int(contents.config["vocab_size"])))
        for tensor in planned:
            dtype = {Type.F32: np.float32, Type.F16: np.float16}.get(tensor.kind, np.uint8)
            size = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(dtype), size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(tensor.read())
    finally:
        writer.close()
    return exactness


def check_model(contents: CheckpointContents) -> None:
    """Check that GGUF, as its readers understand it, can hold the model.

    Raises:
        InputError: naming the key or the layer, and the export that can hold it.
    """
    config, kind = contents.config, contents.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(f"GGUF: model_type {kind} is not written, only {', '.join(ARCHITECTURES)}; {DENSE}")
    rope = _rope(config)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default" and (scaling, ARCHITECTURES[kind]) != ("llama3", "llama"):
        raise InputError(f"GGUF: scaled positions ({rope}) are not written; {DENSE}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < config["max_position_embeddings"]:
        raise InputError(f"GGUF: sliding_window={window} has no place in the format; {DENSE}")
    for layer in contents.layers:
        if layer.group_size % BLOCK or layer.columns % BLOCK:
            raise InputError(
                f"GGUF: {layer.name} has {layer.columns} columns in groups of {layer.group_size}, and blocks of "
                f"{BLOCK} cannot hold it; {DENSE}"
            )


def _plan(contents: CheckpointContents, exactness: Exactness, other_type: Type) -> Iterator[Planned]:
    """Yield the tensors of the file, and count how exact they are."""
    stored, config = PackedTensors(contents), contents.config
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]].upper()], config["num_hidden_layers"]
    )

    def rename(name: str) -> str:
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise InputError(f"GGUF: the format has no name for {name}; {DENSE}")
        return new

    if (factors := rope_factors(config)) is not None:
        exactness.add("factors of positions", Type.F32.name, "yes")
        yield Planned("rope_freqs.weight", Type.F32, factors.shape, lambda: factors)
    for name, header in contents.others.items():
        kind = Type.F32 if len(header.shape) == 1 else other_type
        order = _order(config, name, header.shape[0])
        exact = "rounded once" if kind == Type.F16 else f"rounded to {kind.name[1]} bits"
        exactness.add(_noun(name), kind.name, "yes" if kind == Type.F32 or header.dtype == kind.name else exact)
        read = partial(_other, stored, name, kind, order)
        yield Planned(rename(name), kind, _stored_shape(name, header.shape, kind), read)
    for layer in contents.layers:
        kind, order = block_type(layer), _order(config, f"{layer.name}.weight", layer.rows)
        exact = "rounded to 8 bits" if kind == Type.Q8_0 else "integers and scales; offsets rounded once"
        exactness.add(f"packed, up to {max(layer.widths)} bits", kind.name, exact)
        shape = _stored_shape(layer.name, (layer.rows, layer.columns), kind)
        yield Planned(rename(f"{layer.name}.weight"), kind, shape, partial(_blocks, stored, layer, kind, order))


def _stored_shape(name: str, shape: tuple[int, ...], kind: Type) -> tuple[int, ...]:
    """Return the shape of the array that holds a tensor of a type: its own, or bytes of blocks in the last dimension.

    Raises:
        InputError: if its columns do not fill blocks.
    """
    if kind in (Type.F32, Type.F16):
        return shape
    if shape[-1] % BLOCK:
        raise InputError(f"--gguf-type: {name} has {shape[-1]} columns, no multiple of {BLOCK}; leave it out")
    return (*shape[:-1], shape[-1] // BLOCK * gguf.GGML_QUANT_SIZES[kind][1])


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how positions are rotated, by the name of either generation of config.json."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Return what llama.cpp divides the frequencies of positions by, `[head size / 2]`, or None if nothing scales them.

    It has no other place for the scaling of Llama 3.1, whose frequencies are those of transformers.
    """
    if _rope(config).get("rope_type", _rope(config).get("type")) != "llama3":
        return None
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    built: Any = CONFIG_MAPPING[config["model_type"]].from_dict(values)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](built, "cpu")
    exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float) / (2 * len(scaled))
    return (built.rope_parameters["rope_theta"] ** -exponents / scaled).numpy()


def _noun(name: str) -> str:
    """Return what a tensor that is not packed is, for the table."""
    return "norms and biases" if name.endswith((".bias", "norm.weight")) else "embedding, head and others"


def block_type(layer: PackedLayer) -> Type:
    """Return the type of a packed layer's tensor, by its widest group."""
    widest = max(layer.widths)
    return Type.Q4_1 if widest <= 4 else Type.Q5_1 if widest == 5 else Type.Q8_0


def _order(config: Mapping[str, Any], name: str, rows: int) -> Tensor:
    """Return the rows of a tensor in the order of the file.

    llama.cpp rotates neighbouring rows of a llama's q and k together, transformers rows that are half a head apart.
    """
    projection = name.split(".")[-2]
    if ARCHITECTURES[config["model_type"]] != "llama" or projection not in ("q_proj", "k_proj"):
        return torch.arange(rows)
    heads = config["num_attention_heads"]
    if projection == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _other(stored: PackedTensors, name: str, kind: Type, order: Tensor) -> NDArray[Any]:
    """Return a tensor that is not packed; raise InputError if float16 cannot hold it, which blocks have for scales."""
    tensor = stored.read(name)[order]
    if kind != Type.F32 and not tensor.half().isfinite().all():
        raise InputError(f"GGUF: {name} holds values beyond float16; {DENSE}")
    return gguf.quants.quantize(tensor.float().numpy(), kind)


def _blocks(stored: PackedTensors, layer: PackedLayer, kind: Type, order: Tensor) -> NDArray[Any]:
    """Return the blocks of a packed layer, `[rows, bytes]`, uint8."""
    weight = stored.read_layer(layer)
    if kind == Type.Q8_0:
        return gguf.quants.quantize(weight.dequantize()[order].contiguous().numpy(), kind)
    blocks = affine_blocks(weight, wide=kind == Type.Q5_1)
    if not np.isfinite(blocks[..., :4].copy().view(np.float16)).all():
        raise InputError(f"GGUF: offsets of {layer.name} lie beyond float16; {DENSE}")
    return blocks.reshape(layer.rows, -1)[order.numpy()]


def affine_blocks(weight: QuantizedWeight, wide: bool = False) -> NDArray[np.uint8]:
    """Return the `Q4_1` blocks of a weight, or its `Q5_1` blocks, `[rows, blocks, bytes]`.

    Args:
        weight: the weight, whose columns and group size are multiples of 32.
        wide: whether integers have 5 bits, so that the blocks are `Q5_1`.
    """
    rows, columns = weight.integers.shape
    scale = per_column(weight.scale, weight.group_size, columns)[:, ::BLOCK]
    zero_point = per_column(weight.zero_point, weight.group_size, columns)[:, ::BLOCK]
    affine = torch.stack([scale, -scale * zero_point], dim=-1).half().numpy().view(np.uint8)
    integers = weight.integers.contiguous().numpy().reshape(rows, -1, 2, BLOCK // 2)
    low = integers & 15
    parts = [affine, low[:, :, 0] | low[:, :, 1] << 4]
    if wide:
        parts.insert(1, np.packbits(integers.reshape(rows, -1, BLOCK) >> 4, axis=-1, bitorder="little"))
    return np.concatenate(parts, axis=-1)


def _add_metadata(writer: gguf.GGUFWriter, contents: CheckpointContents) -> None:
    """Add the keys that describe the architecture."""
    config = contents.config
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_name(contents.folder.resolve().name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
