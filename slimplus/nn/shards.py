"""Packed weights on a GPU: Triton kernels over the packed tensors themselves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slimplus.kernels.launch import BUCKETS
from slimplus.kernels.shards import FUSED, FusedShape, can_multiply, fuse_shards, split_shards
from slimplus.nn.packed import PackedLinear, stacked_bias

OLDEST = (8, 0)  # compute capability; before it tensor cores are other ones, and the kernels spill their registers


@dataclass(frozen=True)
class FusedShards:
    """The packed tensors of layers that read the same input, end to end; see `slimplus.kernels.packed_matmul`.

    Attributes:
        tensors: by FUSED.
        counters: int32 zeros by which programs learn who finishes last; zeros again after every launch.
        in_features, group_size: of every layer.
        out_features: rows of each layer.
        widths: those that occur, ascending.
        bias: `[sum of out_features]` or None.
    """

    tensors: list[Tensor]
    counters: Tensor
    in_features: int
    group_size: int
    out_features: list[int]
    widths: list[int]
    bias: Tensor | None

    @staticmethod
    def takes(rows: int, widths: Collection[int], group_size: int) -> bool:
        """Whether the kernels take inputs of so many rows."""
        from slimplus.kernels.packed_matmul import MAX_TOKENS  # Triton, which a machine without a GPU may lack

        return 0 < rows <= MAX_TOKENS and can_multiply(dict.fromkeys(widths, 1), group_size)

    @classmethod
    def from_layers(cls, layers: Sequence[PackedLinear]) -> Self:
        """Lay the layers' tensors end to end; what the layers hold become views of that, so nothing is held twice."""
        first = layers[0]
        bit_counts, out_features = [layer.bit_counts for layer in layers], [layer.out_features for layer in layers]
        tensors = [layer.packed_tensors() for layer in layers]
        fused, shape = fuse_shards(tensors, bit_counts, out_features, first.in_features, first.group_size)
        for layer, views in zip(layers, split_shards(fused, bit_counts, out_features, first.group_size), strict=True):
            layer.replace_tensors(views)
        counters = torch.zeros(shape.counters, dtype=torch.int32, device=first.scales.device)
        parts, bias = [fused[name] for name in FUSED], stacked_bias(layers)
        for tensor in (*parts, counters, *(() if bias is None else (bias,))):
            # Else a CUDA graph that torch.compile makes would copy the weights to addresses of its own at each replay.
            torch._dynamo.mark_static_address(tensor)
        return cls(parts, counters, first.in_features, first.group_size, out_features, list(shape.widths), bias)

    @property
    def nbytes(self) -> int:
        """Memory it takes beside the packed tensors, which are parts of it."""
        return self.counters.nbytes + self.tensors[FUSED.index("shard_table")].nbytes

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile every launch for inputs of `dtype`: none is compiled in the middle of serving."""
        for tokens in BUCKETS:
            self.linear(torch.zeros(tokens, self.in_features, dtype=dtype, device=self.counters.device))

    def linear(self, inputs: Tensor) -> Tensor:
        """`inputs` `[..., in]`, float16 or bfloat16 → `[..., sum of out]`, in their dtype."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        flat = packed_matmul(
            inputs.reshape(-1, self.in_features),
            self.tensors,
            self.counters,
            bias,
            self.in_features,
            self.group_size,
            self.out_features,
            self.widths,
        )
        return flat.view(*inputs.shape[:-1], flat.shape[-1])


# The counters are as they were when the kernel is done. Called mutated, they would keep torch.compile from CUDA graphs.
@torch.library.custom_op("slimplus::packed_matmul", mutates_args=())
def packed_matmul(
    inputs: Tensor,
    tensors: Sequence[Tensor],
    counters: Tensor,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
    out_features: Sequence[int],
    widths: Sequence[int],
) -> Tensor:
    """`inputs` `[tokens, in]` times the weights of a `FusedShards`; an operator of its own for `torch.compile`."""
    from slimplus.kernels.packed_matmul import packed_matmul as launch

    shape = FusedShape(in_features, group_size, tuple(out_features), tuple(widths))
    with torch.cuda.device_of(inputs):  # Triton launches on the current device, whatever that of the tensors is
        return launch(inputs, dict(zip(FUSED, tensors, strict=True)), shape, counters, bias)


@packed_matmul.register_fake
def _(
    inputs: Tensor,
    tensors: Sequence[Tensor],
    counters: Tensor,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
    out_features: Sequence[int],
    widths: Sequence[int],
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], sum(out_features))
