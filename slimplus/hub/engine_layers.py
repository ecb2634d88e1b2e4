"""What the plugins for serving engines share: packed layers of a checkpoint, and the parts that a rank keeps.

Engines multiply q, k and v in one layer, and gate and up in another, while each packed layer has its own widths and its
own order of groups. So each stays a packed layer of its own, and `PackedLinears` multiplies all of them. Under tensor
parallelism, each rank keeps its rows or columns (`slimplus.format.slicing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimplus.format.planes import BitCounts, packed_shapes
from slimplus.format.slicing import slice_columns, slice_rows
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


def stored_layers(
    modules: Mapping[str, BitCounts], shapes: Mapping[str, Sequence[int]], group_size: int, scale_bits: int
) -> dict[str, StoredLayer]:
    """Return the packed layers of a checkpoint by name, as its `quantization_config` describes them."""
    return {
        name: StoredLayer(name, (int(shapes[name][0]), int(shapes[name][1])), counts, group_size, scale_bits)
        for name, counts in modules.items()
    }
