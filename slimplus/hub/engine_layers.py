"""What the plugins for serving engines share: packed layers of a checkpoint, and the parts that a rank keeps.

Engines multiply q, k and v in one layer, and gate and up in another, while each packed layer has its own widths and its
own order of groups. So each stays a packed layer of its own, and `PackedLinears` multiplies all of them. Under tensor
parallelism, each rank keeps its rows or columns (`slimplus.format.slicing`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimplus.format.planes import BitCounts, packed_shapes
from slimplus.format.slicing import slice_columns, slice_rows
from slimplus.hub.checks import check_quantization
from slimplus.nn import PackedLinear
from slimplus.nn.fusion import FusedLinears

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What layers of an engine hold where its model does not say it."""

SHARD_IDS = {"q": 0, "k": 1, "v": 2}
"""Positions in a fused attention input by the engine's shard ids; elsewhere a shard id is the position itself."""


@dataclass(frozen=True)
class StoredLayer:
    """One packed layer of the checkpoint.

    Attributes:
        name: name of the layer.
        shape: shape of the weight, `[out, in]`.
        bit_counts: number of groups of each width.
        group_size: columns a group.
        scale_bits: bits that a scale takes, 8 or 16.
    """

    name: str
    shape: tuple[int, int]
    bit_counts: BitCounts
    group_size: int
    scale_bits: int

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each of the layer's tensors by name."""
        return packed_shapes(self.shape[0], self.bit_counts, self.group_size, self.scale_bits)


@dataclass
class LoadedPart:
    """The part of a stored layer that this rank keeps, collected tensor by tensor.

    Attributes:
        layer: the layer in the checkpoint.
        rows: rows to keep.
        columns: columns to keep.
        tensors: the tensors collected so far, which hold these rows; once all are there, these columns alone.
        group_size: columns a group of the part.
    """

    layer: StoredLayer
    rows: Sequence[range]
    columns: range
    tensors: dict[str, Tensor] = field(default_factory=dict)
    group_size: int = 0

    def add(self, name: str, loaded: Tensor, device: torch.device) -> None:
        """Take a tensor of the checkpoint.

        Raises:
            ValueError: naming the tensor, if config.json asks for another shape, or the columns cannot be cut.
        """
        expected, _ = self.layer.tensors.get(name, (None, None))
        if expected != tuple(loaded.shape):
            raise ValueError(
                f"{self.layer.name}.{name}: config.json asks for {expected}, but the checkpoint holds "
                f"{tuple(loaded.shape)}; export or download it again"
            )
        self.tensors[name] = slice_rows(loaded, self.rows).to(device)
        if self.tensors.keys() == self.layer.tensors.keys():
            self._cut_columns()

    def _cut_columns(self) -> None:
        self.group_size = self.layer.group_size
        if len(self.columns) == self.layer.shape[1]:
            return
        try:
            self.tensors, self.group_size = slice_columns(self.tensors, self.group_size, self.columns)
        except ValueError as error:
            raise ValueError(f"{self.layer.name}: {error}; choose another --tensor-parallel-size") from error

    def module(self) -> PackedLinear:
        """Return a packed layer with the collected tensors.

        Raises:
            ValueError: naming a tensor that the checkpoint lacks, or the one that is wrong.
        """
        if not self.group_size:
            missing = next(name for name in self.layer.tensors if name not in self.tensors)
            raise ValueError(f"the checkpoint lacks {self.layer.name}.{missing}; export or download it again")
        out_features = sum(map(len, self.rows))
        return PackedLinear.from_tensors(self.tensors, len(self.columns), out_features, self.group_size)


class PartLoader:
    """Loader of packed layers through empty parameters of an engine's layer, for whose names the engine finds tensors.

    Args:
        stored: layers of the checkpoint that the engine's layer holds, in the engine's order.
    """

    def __init__(self, stored: Sequence[StoredLayer]) -> None:
        self._names = list(dict.fromkeys(name for one in stored for name in one.tensors))
        self._parts: list[LoadedPart] = []

    def expect(self, layer: nn.Module, parts: Sequence[LoadedPart]) -> None:
        """Give `layer` an empty parameter for each name of a tensor, whose loader collects what this rank keeps."""
        self._parts = list(parts)
        for name in self._names:
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = self._loader(name)  # type: ignore[attr-defined] # the engines' convention
            layer.register_parameter(name, parameter)

    def _loader(self, name: str) -> Any:
        """Return the function that the engine calls with each tensor of the checkpoint for the parameter `name`."""

        def load(parameter: Tensor, loaded: Tensor, shard_id: int | str | None = None) -> None:
            position = SHARD_IDS[shard_id] if isinstance(shard_id, str) else shard_id or 0
            self._parts[position].add(name, loaded, parameter.device)

        return load

    def take(self, layer: nn.Module) -> list[PackedLinear]:
        """Return the packed layers of all parts, and remove the empty parameters from `layer`.

        Raises:
            ValueError: naming a tensor that the checkpoint lacks, or the one that is wrong.
        """
        modules = [part.module() for part in self._parts]
        for name in self._names:
            delattr(layer, name)
        self._parts = []
        return modules


def rows_of_rank(
    stored_rows: Sequence[int], own_rows: Sequence[int], rank: int, ranks: int, replicas: int
) -> list[list[range]] | None:
    """Return the rows that a rank keeps of each stored layer; None if the numbers do not fit together.

    Args:
        stored_rows: rows of each layer in the checkpoint.
        own_rows: rows on this rank of each part of the engine's layer.
        rank: number of this rank.
        ranks: number of ranks.
        replicas: ranks that keep the same rows of k and v.
    """
    shares = len(stored_rows) == len(own_rows)
    whole = (
        list(stored_rows)
        if shares
        else [rows * ranks // (replicas if part else 1) for part, rows in enumerate(own_rows)]
    )
    if sum(whole) != sum(stored_rows) or any(total % own for total, own in zip(whole, own_rows, strict=True)):
        return None
    ranges, start = [], 0
    for total, own in zip(whole, own_rows, strict=True):
        first = rank * (total // own) // ranks * own
        ranges.append(range(start + first, start + first + own))
        start += 0 if shares else total
    return [[part] for part in ranges] if shares else [ranges]


def unshared_rows(stored: Sequence[StoredLayer], own_rows: Sequence[int], ranks: int, engine: str) -> ValueError:
    """Return the error that says that `rows_of_rank` found no rows for an engine's layer."""
    return ValueError(
        f"{stored[0].name}: {engine} wants {own_rows} rows on each of {ranks} ranks, which the checkpoint's "
        f"{[one.shape[0] for one in stored]} rows do not make; choose another --tensor-parallel-size"
    )


class PackedLinears(nn.Module):
    """Packed layers that read the same input, with their outputs side by side.

    Args:
        layers: packed layers without biases, on the device where they are used.
        dtype: dtype of the inputs.
    """

    def __init__(self, layers: Sequence[PackedLinear], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._fused = FusedLinears(layers)
        if self._fused.supports(dtype, rows=1):
            self._fused.warm_up(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]` by all the layers, `[..., sum of out]`."""
        if self._fused.supports(inputs.dtype, inputs.numel() // inputs.shape[-1]):
            return self._fused.linear(inputs)
        return torch.cat([layer(inputs) for layer in self.layers], dim=-1)


def stored_layers(config: Mapping[str, Any], engine: str) -> dict[str, StoredLayer]:
    """Return the packed layers of a checkpoint by name.

    Args:
        config: the `quantization_config` of config.json.
        engine: name of the engine, for the error.

    Raises:
        ValueError: naming the key that is missing or wrong, or an expert, which no engine takes packed.
    """
    check_quantization(config)
    if expert := next((name for name in config["modules"] if name.rpartition(".")[2].isdigit()), None):
        raise ValueError(f"{expert}: {engine} takes no packed experts; serve what `slimplus export --to dense` writes")
    group_size, scale_bits = int(config["group_size"]), int(config.get("scale_bits", 16))
    layers = {}
    for name, counts in config["modules"].items():
        rows, columns = map(int, config["shapes"][name])
        bit_counts = {int(width): int(count) for width, count in counts.items()}
        layers[name] = StoredLayer(name, (rows, columns), bit_counts, group_size, scale_bits)
    return layers


def is_outside(name: str) -> bool:
    """Return whether a layer lies outside the blocks, in whose names there is a number: an embedding or a head."""
    return not any(part.isdigit() for part in name.split("."))


def names_in(prefix: str, layers: Container[str], fused: Mapping[str, list[str]], engine: str) -> list[str]:
    """Return the names of the packed layers that an engine's linear layer holds; none if it is to be the engine's own.

    Args:
        prefix: the engine's name of the layer.
        layers: names of the packed layers.
        fused: own name of an engine's layer → own names of the layers that it holds, where the model says it.
        engine: name of the engine, for the error.

    Raises:
        ValueError: naming the layer, if only some of what it holds is packed.
    """
    parent, dot, own = prefix.rpartition(".")
    parts = [own] if prefix in layers else fused.get(own, FUSED.get(own, [own]))
    names = [f"{parent}{dot}{name}" for name in parts]
    packed = [name for name in names if name in layers]
    if packed and packed != names:
        raise ValueError(
            f"{prefix}: of {', '.join(names)} only {', '.join(packed)} is packed, but {engine} multiplies them in one "
            "layer; quantize all of them or none"
        )
    return packed
