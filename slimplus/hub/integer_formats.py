"""Export of a packed checkpoint to formats of integer zero points and one width a layer: compressed-tensors and GPTQ.

Both store the integers, zero points and scales of the packed format as they are, so that nothing is rounded:

| tensor of layer `L`, `b` bits | content |
|---|---|
| compressed-tensors, `pack-quantized` | |
| `L.weight_packed` int32 `[out, in b / 32]` | integers |
| `L.weight_zero_point` int32 `[out b / 32, groups]` | zero points |
| `L.weight_scale` float16 `[out, groups]` | scales |
| `L.weight_shape` int64 `[2]` | `out, in` |
| GPTQ, `gptq_v2` | |
| `L.qweight` int32 `[in b / 32, out]` | integers |
| `L.qzeros` int32 `[groups, out b / 32]` | zero points |
| `L.scales` float16 `[groups, out]` | scales |
| `L.g_idx` int32 `[in]` | group of each column |

The `b` bits of one value follow those of the value before it, from the lowest bit of a word, along the dimension whose
size is divided by 32; where `b` does not divide 32, values straddle words. The layouts are those of
https://github.com/vllm-project/compressed-tensors (`compressors/pack_quantized`) and
https://github.com/ModelCloud/GPTQModel (`nn_modules/qlinear`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimplus.format.affine import MAX_BITS, QuantizedWeight, per_column
from slimplus.hub.checkpoint import write_shards
from slimplus.hub.contents import CheckpointContents, PackedLayer
from slimplus.hub.exported import Exactness, PackedTensors, cast_whole, write_beside
from slimplus.utils.errors import InputError

WORD = 32  # bits
ELSEWHERE = "`--to gguf` and `--to dense` hold it"


@dataclass(frozen=True)
class IntegerFormat:
    """A format whose layers have one width and integer zero points.

    Attributes:
        name: its name in messages.
        widths: widths that it holds.
        uneven: function that returns what of a layer's shape the format cannot hold, in words, or None.
        tensors: function that returns the tensors of a layer, by their names in the layer.
        config: function that returns the `quantization_config` of config.json, given the packed layers and the names of
            the others with a weight.
    """

    name: str
    widths: tuple[int, ...]
    uneven: Callable[[PackedLayer], str | None]
    tensors: Callable[[QuantizedWeight], dict[str, Tensor]]
    config: Callable[[Sequence[PackedLayer], Sequence[str]], dict[str, Any]]


def export_integers(contents: CheckpointContents, folder: Path, dtype: torch.dtype, layout: IntegerFormat) -> Exactness:
    """Write a checkpoint in a format of integer zero points, layer by layer.

    An embedding or a head that is packed becomes an ordinary one.

    Args:
        contents: contents of the packed checkpoint.
        folder: empty folder to write to.
        dtype: dtype of all floating-point tensors but scales, which are float16.
        layout: the format.

    Raises:
        InputError: if the format cannot hold the model, in a sentence that says what can, or a value is too large for
            `dtype`.
        OSError: if the disk is full or cannot be written.
    """
    stored, exactness = PackedTensors(contents), Exactness()
    check_layers(contents, stored, layout)
    write_shards(folder, _tensors(contents, stored, dtype, layout, exactness))
    dense = [layer.name for layer in contents.layers if not layer.in_block]
    linears = [
        *dense,
        *(name.removesuffix(".weight") for name, each in contents.others.items() if _is_matrix(each.shape)),
    ]
    write_beside(contents, folder, dtype, layout.config(contents.block_layers, linears))
    return exactness


def check_layers(contents: CheckpointContents, stored: PackedTensors, layout: IntegerFormat) -> None:
    """Check that a format can hold the packed layers of the blocks; of their tensors only zero points are read.

    Raises:
        InputError: naming the layer, the key of the recipe that makes it fit, and the exports that hold it as it is.
    """
    for layer in contents.block_layers:
        if layer.name.rpartition(".")[2].isdigit():
            raise InputError(f"{layout.name}: the experts of {layer.name} have no place here; `--to dense` holds them")
        if len(layer.groups) > 1:
            raise InputError(
                f"{layout.name}: {layer.name} mixes groups of {_listed(layer.groups)} bits, and the format has one "
                f"width a layer: quantize with quantization.per_layer=true; {ELSEWHERE}"
            )
        (width,) = layer.groups
        if width not in layout.widths:
            raise InputError(
                f"{layout.name}: {layer.name} has {width} bits, and the format holds {_listed(layout.widths)}: give "
                f"quantization.widths of these; {ELSEWHERE}"
            )
        if (uneven := layout.uneven(layer)) is not None:
            raise InputError(f"{layout.name}: {layer.name} has {uneven}; {ELSEWHERE}")
        zeros, bits = (stored.read(f"{layer.name}.{key}") for key in ("zeros", "group_bits"))
        if (zeros.int() % (2 ** (MAX_BITS - bits.int()))[:, None]).any():
            raise InputError(
                f"{layout.name}: {layer.name} has fractional zero points, and the format holds integers: quantize with "
                f"quantization.zero_points=integer; {ELSEWHERE}"
            )


def _tensors(
    contents: CheckpointContents, stored: PackedTensors, dtype: torch.dtype, layout: IntegerFormat, exactness: Exactness
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors with their names, and count how exact they are."""
    name_of_dtype = str(dtype).removeprefix("torch.")
    for name in contents.others:
        tensor = stored.read(name)
        cast = cast_whole(name, tensor, dtype) if tensor.is_floating_point() else tensor
        exactness.add("not packed", name_of_dtype, "yes" if torch.equal(cast.to(tensor.dtype), tensor) else "rounded")
        yield name, cast
    for layer in contents.layers:
        weight = stored.read_layer(layer)
        if not layer.in_block:
            exactness.add("packed outside the blocks", name_of_dtype, "rounded once")
            yield f"{layer.name}.weight", cast_whole(layer.name, weight.dequantize(), dtype)
            continue
        exactness.add("packed", f"{int(weight.bits[0])} bits", "integers, zero points and scales")
        for key, tensor in layout.tensors(weight).items():
            yield f"{layer.name}.{key}", tensor


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Return int32 words `[rows, ceil(count bits / 32)]` that hold values `[rows, count]`, uint8, bit after bit."""
    stream = np.unpackbits(values.contiguous().numpy()[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(stream.reshape(len(values), -1), axis=-1, bitorder="little")
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def _uneven_groups(layer: PackedLayer) -> str | None:
    """Return the columns of a layer in words, if its last group is shorter than the others."""
    if layer.columns % layer.group_size == 0:
        return None
    return f"{layer.columns} columns, no multiple of its group size of {layer.group_size}"


def _uneven_words(layer: PackedLayer) -> str | None:
    """Return the shape of a layer in words, if its integers or zero points do not fill whole words."""
    width = layer.widths[0]
    if layer.rows * width % WORD == layer.columns * width % WORD == 0:
        return None
    return f"{layer.rows} rows and {layer.columns} columns of {width} bits, which do not fill words of {WORD} bits"


def _compressed_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of a layer in compressed-tensors' `pack-quantized`."""
    bits = int(weight.bits[0])
    return {
        "weight_packed": pack_words(weight.integers, bits),
        "weight_zero_point": pack_words(weight.zero_point.T.to(torch.uint8), bits).T.contiguous(),
        "weight_scale": weight.scale.half(),
        "weight_shape": torch.tensor(weight.integers.shape),
    }


def _gptq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of a layer in GPTQ's `gptq_v2`."""
    bits, columns = int(weight.bits[0]), weight.integers.shape[1]
    groups = torch.arange(len(weight.bits), dtype=torch.int32)
    return {
        "qweight": pack_words(weight.integers, bits).T.contiguous(),
        "qzeros": pack_words(weight.zero_point.T.to(torch.uint8), bits),
        "scales": weight.scale.half().T.contiguous(),
        "g_idx": per_column(groups, weight.group_size, columns).contiguous(),
    }


def _compressed_tensors_config(layers: Sequence[PackedLayer], others: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of compressed-tensors, a group of the configuration for each width.

    `dequantize` has transformers dequantize the layers as it loads them: it cannot load zero points otherwise
    (compressed-tensors 0.20, whose compressor leaves them unpacked on the meta device). It takes the first group's
    width for all layers (transformers 5.23); with the widest first it fails for the others, and does not
    read them wrongly.
    """
    groups = {}
    by_width = dict(sorted(_by_width(layers).items(), reverse=True))
    for number, (width, names) in enumerate(by_width.items()):
        weights = {"num_bits": width, "type": "int", "symmetric": False, "strategy": "group", "dynamic": False}
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(by_width) == 1 else names,
            "weights": weights | {"group_size": layers[0].group_size},
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*others, "lm_head"}),
        "kv_cache_scheme": None,
        "dequantize": True,
    }


def _gptq_config(layers: Sequence[PackedLayer], others: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of GPTQ: the commonest width, and `dynamic` for the layers of another one."""
    by_width = _by_width(layers)
    usual = max(by_width, key=lambda width: len(by_width[width]))
    dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(name)}$": {} for name in others if name != "lm_head"}
    for width, names in by_width.items():
        if width != usual:
            dynamic |= {f"+:^{re.escape(name)}$": {"bits": width} for name in names}
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": usual,
        "group_size": layers[0].group_size,
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _by_width(layers: Sequence[PackedLayer]) -> dict[int, list[str]]:
    """Return the names of the layers by their width."""
    found: Mapping[int, list[str]] = defaultdict(list)
    for layer in layers:
        found[layer.widths[0]].append(layer.name)
    return dict(sorted(found.items()))


def _is_matrix(shape: Sequence[int]) -> bool:
    return len(shape) == 2


def _listed(numbers: Sequence[int] | Mapping[int, int]) -> str:
    """Return numbers as text."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


COMPRESSED_TENSORS = IntegerFormat(
    "compressed-tensors", tuple(range(1, MAX_BITS + 1)), _uneven_groups, _compressed_tensors, _compressed_tensors_config
)
GPTQ = IntegerFormat("GPTQ", (2, 3, 4, 8), _uneven_words, _gptq, _gptq_config)
