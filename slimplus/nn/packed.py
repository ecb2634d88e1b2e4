"""A linear layer that keeps its weight bit-packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from slimplus.quantization.affine import QuantizedWeight
from slimplus.quantization.packing import check_features, count_bits, pack, packed_shapes, unpack


def dequantize_packed(
    packed: Mapping[str, Tensor],
    bit_counts: Mapping[int, int],
    shape: tuple[int, int],
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of `shape` `[out, in]` that packed tensors hold; exact in float32, rounded once to any other dtype."""
    if packed["scales"].is_cuda:
        from slimplus.kernels.dequantize import dequantize  # Triton, which a machine without a GPU may lack

        return dequantize(packed, bit_counts, *shape, group_size, dtype)
    return unpack(packed, *shape, group_size).dequantize().to(dtype)


class PackedLinear(nn.Module):
    """`nn.Linear` for inference over the packed format of `slimplus.quantization.packing`.

    The forward dequantizes the whole weight to the dtype of the input (by a Triton kernel on a GPU) and uses the
    library's matmul.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        group_size: columns a group.
        bit_counts: number of groups of each width; it fixes the shape of every buffer.
        bias: whether there is one.
        dtype: of the bias.

    Raises:
        ValueError: if `bit_counts` does not describe `in_features` columns.
    """

    scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bit_counts: Mapping[int, int],
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_features(in_features, bit_counts, group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.bit_counts = dict(bit_counts)
        for name, (shape, tensor_dtype) in packed_shapes(out_features, bit_counts, group_size).items():
            self.register_buffer(name, torch.zeros(shape, dtype=tensor_dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None) -> Self:
        """Pack `weight`; the bias keeps its dtype. The layer lies on the CPU."""
        out_features, in_features = weight.integers.shape
        tensors = pack(weight)
        if bias is not None:
            tensors["bias"] = bias.detach().cpu()
        return cls.from_tensors(tensors, in_features, out_features, weight.group_size)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], in_features: int, out_features: int, group_size: int) -> Self:
        """A layer that holds the tensors of a packed weight, and its bias if there is one."""
        with torch.device("meta"):
            layer = cls(in_features, out_features, group_size, count_bits(tensors["group_bits"]), "bias" in tensors)
        layer.load_state_dict(dict(tensors), assign=True)
        return layer.requires_grad_(False)

    def packed_tensors(self) -> dict[str, Tensor]:
        """The tensors of the packed format, by name."""
        return dict(self.named_buffers(recurse=False))

    def quantized_weight(self) -> QuantizedWeight:
        """Integers, scales and zero points in the original order of columns."""
        return unpack(self.packed_tensors(), self.out_features, self.in_features, self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]`; exact in float32, rounded once to any other dtype."""
        shape = (self.out_features, self.in_features)
        return dequantize_packed(self.packed_tensors(), self.bit_counts, shape, self.group_size, dtype)

    def to_linear(self) -> nn.Linear:
        """An ordinary float32 layer with the same weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        tensors = {"weight": self.dequantize()} | ({} if self.bias is None else {"bias": self.bias.float()})
        linear.load_state_dict(tensors, assign=True)
        return linear.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` `[..., in]` → `[..., out]`, in the dtype of the input (of autocast where it is on)."""
        return nn.functional.linear(inputs, self.dequantize(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        widths = ", ".join(f"{count}×{width}-bit" for width, count in self.bit_counts.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, groups=({widths}), bias={self.bias is not None}"
        )
