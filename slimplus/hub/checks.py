"""Checks of a checkpoint's claims, before transformers builds or reads anything by them.

Checkpoints come from strangers: a wrong number must give an error message, not a huge allocation or an endless loop.
Each size is checked against others, from the architecture down to the tensors that the files really hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from slimplus.format.affine import MAX_BITS, SCALE_BITS
from slimplus.format.checks import LARGEST_SIZE, check_layout
from slimplus.format.planes import packed_shapes

KEY = "quantization_config"
REQUIRED = ("bits", "group_size", "modules", "method", "shapes", "full_size_bytes")
DTYPES = {torch.int16: "I16", torch.int32: "I32", torch.float16: "F16", torch.uint8: "U8"}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
WIDTHS = {str(width) for width in range(1, MAX_BITS + 1)}
SIZES = re.compile(
    r"vocab_size|hidden_size|intermediate_size|head_dim|num_attention_heads|num_key_value_heads|ffn_dim"
    r"|max_position_embeddings|word_embed_proj_dim|n_positions|n_embd|n_head|n_heads|num_heads|d_model"
)
"""Keys of config.json that are at least 1 in every architecture; architectures have further sizes."""
COUNTS = re.compile(
    r"(\w+_)?(num|n|number_of)_(\w+_)?(layers?|experts?|heads?|blocks?|codebooks?|groups?|stacks?|inputs)"
    r"|(\w+_)?depths?|(vision|encoder|audio)_layers"  # of towers
)
"""Keys of numbers of modules, over which the code that builds a model loops."""
MOST_MODULES = 1024  # of one kind in a block; more are possible only where each is packed
MOST_BUFFER_BYTES = 2**30  # of tables that a model computes and no file stores, such as masks


def check_quantization(values: object) -> None:
    """Check the types and ranges of a `quantization_config` as read from JSON.

    Raises:
        ValueError: naming the key that is missing or wrong.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{KEY} is not a mapping")
    if missing := [key for key in REQUIRED if key not in values]:
        raise ValueError(f"{KEY} lacks {', '.join(missing)}")
    if not _is_size(values["bits"]) or values["bits"] > MAX_BITS:
        raise ValueError(f"{KEY}.bits: {_shown(values['bits'])} is not a whole number from 1 to {MAX_BITS}")
    size = values["full_size_bytes"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{KEY}.full_size_bytes: {_shown(size)} is not a number of bytes")
    if not isinstance(values["method"], str):
        raise ValueError(f"{KEY}.method: {_shown(values['method'])} is not a string")
    if not _is_size(values["group_size"]):
        raise ValueError(f"{KEY}.group_size: {_shown(values['group_size'])} is not a size")
    if values.get("scale_bits", 16) not in SCALE_BITS:
        raise ValueError(f"{KEY}.scale_bits: {_shown(values['scale_bits'])} is neither 8 nor 16")
    _check_layers(values["modules"], values["shapes"], values["group_size"])


def _check_layers(modules: Any, shapes: Any, group_size: int) -> None:
    """Check the group counts and the shapes of the packed layers, and that the two describe the same layers."""
    for key, named in (("modules", modules), ("shapes", shapes)):
        if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
            raise ValueError(f"{KEY}.{key} is not a mapping from names of layers")
    if modules.keys() != shapes.keys():
        name = sorted(modules.keys() ^ shapes.keys())[0]
        raise ValueError(f"{KEY}: {_shown(name)} is in one of modules and shapes, not in both")
    for name, counts in modules.items():
        shape = shapes[name]
        if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(_is_size(size) for size in shape):
            raise ValueError(f"{KEY}.shapes: {_shown(name)}: {_shown(shape)} is not [rows, columns]")
        try:
            check_layout((shape[0], shape[1]), _bit_counts(counts), group_size)
        except ValueError as error:
            raise ValueError(f"{KEY}.modules: {_shown(name)}: {error}") from error


def _bit_counts(counts: object) -> dict[int, int]:
    """Return the number of groups of each width, whose keys are text in JSON."""
    if not isinstance(counts, Mapping) or not all(str(width) in WIDTHS and _is_size(n) for width, n in counts.items()):
        raise ValueError(f"{_shown(counts)} is not a mapping from widths, 1 to {MAX_BITS}, to numbers of groups")
    return {int(width): count for width, count in counts.items()}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_SIZE


def _shown(value: object) -> str:
    """Return the value as text of at most 80 characters, however long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_architecture(values: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Check that config.json describes a causal language model of transformers, of bounded sizes.

    Building a model from it then ends soon: there are no more blocks than packed layers. Its tensors have no memory
    until `check_other_tensors` has compared their shapes with the files.

    Args:
        values: content of config.json.
        modules: names of the packed layers.

    Raises:
        ValueError: naming the key that is wrong.
    """
    # Imported late, since transformers imports this module while it is being imported itself.
    from transformers.models.auto import modeling_auto

    architectures = {
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in architectures:
        raise ValueError(f"config.json: model_type: {_shown(kind)} is no causal language model of transformers")
    _check_sizes(values, len(list(modules)))


def _check_sizes(values: Mapping[str, Any], packed: int, is_text: bool = True) -> None:
    """Check the numbers of config.json, or of a part of it, against their bounds and the number of packed layers.

    Of a part that is not the text model, such as one for images, no layers are packed.
    """
    most_blocks = packed if is_text else max(packed, MOST_MODULES)
    for key, value in ((str(key), value) for key, value in values.items()):
        if key in LAYERS and is_text and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"config.json: {key}: {_shown(value)} does not fit the {packed} packed layers")
        if isinstance(value, Mapping) and key != KEY:
            _check_sizes(value, packed, is_text and key == "text_config")
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, Mapping) and not isinstance(value, Mapping):
                _check_sizes(number, packed, False)
            if not isinstance(number, int) or isinstance(number, bool):
                if SIZES.fullmatch(key) and number is not None and not isinstance(value, list | tuple):
                    raise ValueError(f"config.json: {key}: {_shown(number)} is not a size from 1 to {LARGEST_SIZE}")
                continue
            if key in LAYERS and not 1 <= number <= most_blocks:
                raise ValueError(f"config.json: {key}: {_shown(number)} does not fit the {packed} packed layers")
            if SIZES.fullmatch(key) and not 1 <= number <= LARGEST_SIZE:
                raise ValueError(f"config.json: {key}: {_shown(number)} is not a size from 1 to {LARGEST_SIZE}")
            if COUNTS.fullmatch(key) and number > max(packed, MOST_MODULES):
                raise ValueError(f"config.json: {key}: {_shown(number)} does not fit the {packed} packed layers")
            if abs(number) > LARGEST_SIZE and "theta" not in key:
                raise ValueError(f"config.json: {key}: {_shown(number)} is larger than {LARGEST_SIZE}")


def check_buffers(buffers: Mapping[str, torch.Tensor]) -> None:
    """Check that the tables that a model computes when it is loaded have a bounded size.

    Args:
        buffers: the model's buffers that no file stores, on the meta device, by name.

    Raises:
        ValueError: naming the largest buffer.
    """
    sizes = {name: prod(buffer.shape) * buffer.element_size() for name, buffer in buffers.items()}
    if sum(sizes.values()) > MOST_BUFFER_BYTES:
        name = max(sizes, key=lambda key: sizes[key])
        raise ValueError(
            f"config.json: the buffer {name} would be {list(buffers[name].shape)}; its sizes, such as "
            "max_position_embeddings, are too large"
        )


Headers = Mapping[str, tuple[str, list[int]]]
"""Dtype, as safetensors calls it, and shape of every stored tensor, by the tensor's name."""


def read_headers(files: Iterable[str]) -> Headers:
    """Read the dtype and shape of every tensor in safetensors files.

    Raises:
        ValueError: naming the file, if it is damaged or not a safetensors file; the latter is never opened.
    """
    return {name: header for file in files for name, header in _headers(file)}


def check_packed_tensors(
    stored: Headers,
    group_size: int,
    modules: Mapping[str, Mapping[int, int]],
    shapes: Mapping[str, list[int]],
    scale_bits: int = 16,
) -> None:
    """Check that every packed tensor is stored with the shape and dtype that config.json tells.

    Args:
        stored: dtype and shape of the stored tensors.
        group_size: columns a group.
        modules: number of groups of each width, by the layer's name.
        shapes: `[out, in]` of each layer's weight, by the layer's name.
        scale_bits: bits that a scale takes.

    Raises:
        ValueError: naming the tensor that is missing or differs.
    """
    for layer, counts in modules.items():
        for name, (shape, dtype) in packed_shapes(shapes[layer][0], counts, group_size, scale_bits).items():
            expected = (DTYPES[dtype], list(shape))
            found = stored.get(f"{layer}.{name}")
            if found is None:
                raise ValueError(f"the checkpoint lacks the tensor {layer}.{name}; export or download it again")
            if found != expected:
                raise ValueError(
                    f"{layer}.{name} is {found[0]} {found[1]} in the files, and {expected[0]} {expected[1]} "
                    "by config.json"
                )


def check_other_tensors(stored: Headers, shapes: Mapping[str, Sequence[int]], tied: Mapping[str, str]) -> None:
    """Check that every tensor of the model is stored in its shape, before transformers allocates memory for it.

    Args:
        stored: dtype and shape of the stored tensors.
        shapes: shape of every tensor of the model, by its name.
        tied: name of the tensor that a tied tensor shares, by the tied tensor's name; one of the two must be stored.

    Raises:
        ValueError: naming the tensor that is missing or differs.
    """
    held = {tied.get(name, name): shape for name, (_, shape) in stored.items()}
    for name, shape in shapes.items():
        found = held.get(tied.get(name, name))
        if found is None:
            raise ValueError(f"the checkpoint lacks the tensor {name}; export or download it again")
        if found != list(shape):
            raise ValueError(f"{name} is {found} in the files, and {list(shape)} by config.json")


def _headers(file: str) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """Yield the name, dtype and shape of every tensor of a file."""
    if not file.endswith(".safetensors"):
        raise ValueError(f"{file} is not a safetensors file, and packed checkpoints are read from no others")
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_slice(name)
                yield name, (tensor.get_dtype(), tensor.get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); download the checkpoint again") from error
