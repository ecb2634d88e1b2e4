"""Widths and sizes of the packed layers of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimplus.quantization.affine import weight_bits
from slimplus.quantization.packing import count_bits


@dataclass
class PackedLayout:
    """Sums over the packed layers, added one by one.

    Attributes:
        bits: layer → width of each group, in column order.
        shapes: layer → rows and columns.
        weights: number of weights, without padding.
        weight_bits: their widths, summed.
        packed_bytes: all that is stored for them, biases apart.
        outer_bits: name → bits of the packed layers outside the blocks, which the sums above leave out.
        outer_counts: name → number of their groups of each width.
        outer_bytes: all that is stored for them.
        records: how each block came about: losses, damping, seconds.
    """

    bits: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    weights: int = 0
    weight_bits: int = 0
    packed_bytes: int = 0
    outer_bits: dict[str, int] = field(default_factory=dict)
    outer_counts: dict[str, dict[int, int]] = field(default_factory=dict)
    outer_bytes: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, packed: dict[str, Tensor], shape: torch.Size, group_size: int) -> None:
        """Count one layer of `shape` `[out, in]`."""
        widths = packed["group_bits"][torch.argsort(packed["group_index"])].int()
        self.bits[name] = widths.tolist()
        self.shapes[name] = list(shape)
        self.weights += shape.numel()
        self.weight_bits += weight_bits(widths, group_size, *shape)
        self.packed_bytes += sum(tensor.nbytes for key, tensor in packed.items() if key != "bias")

    def add_outer(self, name: str, packed: Mapping[str, Tensor], shape: torch.Size) -> None:
        """Count the embedding or the head, of `shape` `[vocabulary, hidden]`."""
        self.shapes[name] = list(shape)
        self.outer_counts[name] = count_bits(packed["group_bits"])
        self.outer_bits[name] = max(self.outer_counts[name])
        self.outer_bytes += sum(tensor.nbytes for tensor in packed.values())

    @property
    def bit_counts(self) -> dict[str, dict[int, int]]:
        """Layer → number of groups of each width."""
        return {name: count_bits(torch.tensor(widths)) for name, widths in self.bits.items()} | self.outer_counts

    @property
    def average_bits(self) -> float:
        """Of the weights in the blocks."""
        return self.weight_bits / self.weights

    def figures(self, size_bytes: int, full_bytes: int) -> dict[str, Any]:
        """For metrics.json: the checkpoint of `size_bytes` against the model at 16 bit, `full_bytes`."""
        return {
            "average_bits": self.average_bits,
            "bits_per_weight": 8 * self.packed_bytes / self.weights,
            "outer_bits": self.outer_bits,
            "outer_bytes": self.outer_bytes,
            "size_bytes": size_bytes,
            "full_size_bytes": full_bytes,
            "compression": full_bytes / size_bytes,
            "blocks": self.records,
        }
