"""What a checkpoint claims, checked before transformers builds or reads anything by it.

Checkpoints come from strangers: a wrong number must give a sentence, not an allocation or an endless loop. Sizes are
bounded by each other, from the architecture down to the tensors that the files really hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from slimplus.format.affine import MAX_BITS, SCALE_BITS
from slimplus.format.checks import LARGEST_SIZE, check_layout
from slimplus.format.planes import packed_shapes
from slimplus.models.architectures import BLOCKS

KEY = "quantization_config"
REQUIRED = ("bits", "group_size", "modules", "method", "shapes", "full_size_bytes")
DTYPES = {torch.int16: "I16", torch.int32: "I32", torch.float16: "F16", torch.uint8: "U8"}
LAYERS = "num_hidden_layers"
WIDTHS = {str(width) for width in range(1, MAX_BITS + 1)}
# What the supported architectures build tensors from.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads"),
    *("ffn_dim", "word_embed_proj_dim", "max_position_embeddings"),
)


def check_quantization(values: object) -> None:
    """Check the types and ranges of a `quantization_config`, as JSON gives it.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{KEY} is no mapping")
    if missing := [key for key in REQUIRED if key not in values]:
        raise ValueError(f"{KEY} lacks {', '.join(missing)}")
    if not _is_size(values["bits"]) or values["bits"] > MAX_BITS:
        raise ValueError(f"{KEY}.bits: {_shown(values['bits'])} is no whole number from 1 to {MAX_BITS}")
    size = values["full_size_bytes"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{KEY}.full_size_bytes: {_shown(size)} is no number of bytes")
    if not isinstance(values["method"], str):
        raise ValueError(f"{KEY}.method: {_shown(values['method'])} is no text")
    if not _is_size(values["group_size"]):
        raise ValueError(f"{KEY}.group_size: {_shown(values['group_size'])} is no size")
    if values.get("scale_bits", 16) not in SCALE_BITS:
        raise ValueError(f"{KEY}.scale_bits: {_shown(values['scale_bits'])} is neither 8 nor 16")
    modules, shapes = values["modules"], values["shapes"]
    for key, named in (("modules", modules), ("shapes", shapes)):
        if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
            raise ValueError(f"{KEY}.{key} is no mapping from names of layers")
    if modules.keys() != shapes.keys():
        name = sorted(modules.keys() ^ shapes.keys())[0]
        raise ValueError(f"{KEY}: {_shown(name)} is in one of modules and shapes, not in both")
    for name, counts in modules.items():
        shape = shapes[name]
        if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(_is_size(size) for size in shape):
            raise ValueError(f"{KEY}.shapes: {_shown(name)}: {_shown(shape)} is not [rows, columns]")
        try:
            check_layout((shape[0], shape[1]), _bit_counts(counts), values["group_size"])
        except ValueError as error:
            raise ValueError(f"{KEY}.modules: {_shown(name)}: {error}") from error


def _bit_counts(counts: object) -> dict[int, int]:
    if not isinstance(counts, Mapping) or not all(str(width) in WIDTHS and _is_size(n) for width, n in counts.items()):
        raise ValueError(f"{_shown(counts)} is no mapping from widths, 1 to {MAX_BITS}, to numbers of groups")
    return {int(width): count for width, count in counts.items()}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_SIZE


def _shown(value: object) -> str:
    """Short, whatever a stranger put there."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_architecture(values: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Check that a model built from config.json is no larger than what its packed layers, by name, can be part of.

    Raises:
        ValueError: naming the key.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in BLOCKS:  # of others, nobody knows what they build tensors from
        raise ValueError(f"config.json: model_type: {_shown(kind)} is not supported; supported are {', '.join(BLOCKS)}")
    for key in SIZES:
        if values.get(key) is not None and not _is_size(values[key]):
            raise ValueError(f"config.json: {key}: {_shown(values[key])} is no size")
    layers, packed = values.get(LAYERS), len(list(modules))
    if not isinstance(layers, int) or not 1 <= layers <= packed:
        raise ValueError(f"config.json: {LAYERS}: {_shown(layers)} does not fit the {packed} packed layers")


Headers = Mapping[str, tuple[str, list[int]]]
"""Name of every stored tensor → dtype, as safetensors calls it, and shape."""


def read_headers(files: Iterable[str]) -> Headers:
    """What the files hold.

    Raises:
        ValueError: naming the file; one that is not safetensors is never opened.
    """
    return {name: header for file in files for name, header in _headers(file)}


def check_packed_tensors(
    stored: Headers,
    group_size: int,
    modules: Mapping[str, Mapping[int, int]],
    shapes: Mapping[str, list[int]],
    scale_bits: int = 16,
) -> None:
    """Check that every packed tensor is stored with the shape and dtype that config.json says.

    Raises:
        ValueError: naming the tensor.
    """
    for layer, counts in modules.items():
        for name, (shape, dtype) in packed_shapes(shapes[layer][0], counts, group_size, scale_bits).items():
            expected = (DTYPES[dtype], list(shape))
            found = stored.get(f"{layer}.{name}")
            if found is None:
                raise ValueError(f"the checkpoint lacks the tensor {layer}.{name}")
            if found != expected:
                raise ValueError(
                    f"{layer}.{name} is {found[0]} {found[1]} in the files, and {expected[0]} {expected[1]} "
                    "by config.json"
                )


def check_other_tensors(stored: Headers, shapes: Mapping[str, Sequence[int]], tied: Mapping[str, str]) -> None:
    """Check that what the model needs is stored in its shape; transformers makes room for it before it looks.

    Args:
        stored: what the files hold.
        shapes: of every tensor of the model, by its name.
        tied: name of a tensor → that of the one which it is, so that one of them is enough.

    Raises:
        ValueError: naming the tensor.
    """
    held = {tied.get(name, name): shape for name, (_, shape) in stored.items()}
    for name, shape in shapes.items():
        found = held.get(tied.get(name, name))
        if found is None:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        if found != list(shape):
            raise ValueError(f"{name} is {found} in the files, and {list(shape)} by config.json")


def _headers(file: str) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """Name, dtype and shape of every tensor of a file."""
    if not file.endswith(".safetensors"):
        raise ValueError(f"{file} is no safetensors file; packed checkpoints are read from nothing else")
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_slice(name)
                yield name, (tensor.get_dtype(), tensor.get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); download the checkpoint again") from error
