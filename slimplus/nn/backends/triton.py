"""Products with packed weights on a GPU, by Triton kernels that read the packed tensors themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slimplus.format.planes import BitCounts, packed_shapes
from slimplus.kernels.fused import FUSED, GROUP_SIZES, FusedShape, fuse_layers, split_layers
from slimplus.kernels.launch import BUCKETS

OLDEST = (8, 0)  # compute capability: on older tensor cores the kernels would spill their registers


@dataclass(frozen=True)
class TritonWeight:
    """The packed tensors of layers that read the same input, laid end to end for `slimplus.kernels.packed_matmul`.

    Attributes:
        tensors: the fused tensors, in the order of `FUSED`.
        counters: int32 zeros, by which the programs of a launch learn which one finishes last; zeros after each launch.
        in_features: columns of every layer.
        group_size: columns a group in every layer.
        out_features: rows of each layer.
        widths: widths that occur in any layer, ascending.
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
    def supports(rows: int, widths: Collection[int], group_size: int) -> bool:
        """Return whether the kernels multiply `rows` rows of input by groups of these widths and size."""
        from slimplus.kernels.packed_matmul import max_tokens  # Triton, which a machine without a GPU may lack

        return group_size in GROUP_SIZES and 0 < rows <= max_tokens(widths)

    @classmethod
    def from_packed(
        cls,
        tensors: Sequence[Mapping[str, Tensor]],
        bit_counts: Sequence[BitCounts],
        shapes: Sequence[tuple[int, int]],
        group_size: int,
        bias: Tensor | None,
    ) -> tuple[Self, list[dict[str, Tensor]]]:
        """Lay the packed tensors of layers that read the same input end to end.

        Args:
            tensors: packed tensors of each layer by name.
            bit_counts: number of groups of each width in each layer.
            shapes: `[out, in]` of each layer; all have the same columns.
            group_size: columns a group.
            bias: `[sum of out_features]` or None.

        Returns:
            The weight, and for each layer views of it that replace the layer's tensors, so that nothing is held twice.
        """
        out_features, in_features = [rows for rows, _ in shapes], shapes[0][1]
        fused, shape = fuse_layers(tensors, bit_counts, out_features, in_features, group_size)
        counters = torch.zeros(shape.counters, dtype=torch.int32, device=tensors[0]["scales"].device)
        parts = [fused[name] for name in FUSED]
        for tensor in (*parts, counters, *(() if bias is None else (bias,))):
            # Else a CUDA graph of torch.compile would copy the weights to its own addresses at each replay.
            torch._dynamo.mark_static_address(tensor)
        weight = cls(parts, counters, in_features, group_size, out_features, list(shape.widths), bias)
        return weight, split_layers(fused, bit_counts, out_features, group_size)

    @property
    def nbytes(self) -> int:
        """Memory beside that of the packed tensors, in bytes."""
        return self.counters.nbytes + self.tensors[FUSED.index("layer_table")].nbytes

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernel for inputs of `dtype` with any number of rows, so that none is compiled while serving."""
        for tokens in BUCKETS:
            if self.supports(tokens, self.widths, self.group_size):
                self.linear(torch.zeros(tokens, self.in_features, dtype=dtype, device=self.counters.device))

    def _idle_counters(self) -> Tensor:
        """Return counters that no launch on another stream uses at the same time.

        A captured launch keeps the weight's own ones, so that a graph's replay need not clear others first.
        """
        device = self.counters.device
        if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return self.counters
        alone = torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
        return self.counters if alone else torch.zeros_like(self.counters)

    def linear(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]`, float16 or bfloat16, by all the layers, `[..., sum of out]` in their dtype."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        flat = packed_matmul(
            inputs.reshape(-1, self.in_features),
            self.tensors,
            self._idle_counters(),
            bias,
            self.in_features,
            self.group_size,
            self.out_features,
            self.widths,
        )
        return flat.view(*inputs.shape[:-1], flat.shape[-1])


# The kernel leaves the counters as it found them. Declared as mutated, they would keep torch.compile from CUDA graphs.
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
    """Multiply `inputs` `[tokens, in]` by the tensors of a `TritonWeight`; one operator for `torch.compile`."""
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


@torch.library.custom_op("slimplus::dequantized_linear", mutates_args=())
def dequantized_linear(
    inputs: Tensor,
    tensors: Sequence[Tensor],
    widths: Sequence[int],
    counts: Sequence[int],
    out_features: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """Multiply `inputs` `[tokens, in]` by a packed weight that is dequantized slice by slice, `[tokens, out]`.

    Args:
        inputs: inputs on a GPU, in the dtype to multiply in.
        tensors: tensors of the packed format, in the order of `packed_shapes`.
        widths: widths that occur in the layer.
        counts: number of groups of each of them.
        out_features: rows of the weight.
        group_size: columns a group.
        bias: `[out]` in the dtype of the inputs, or None.
    """
    from slimplus.kernels.dequantize import dequantized_matmul  # Triton, which a machine without a GPU may lack

    outputs = inputs.new_empty(inputs.shape[0], out_features)
    bit_counts = dict(zip(widths, counts, strict=True))
    packed = dict(zip(packed_shapes(out_features, bit_counts, group_size), tensors, strict=True))
    with torch.cuda.device_of(inputs):
        dequantized_matmul(inputs, packed, bit_counts, group_size, outputs, bias)
    return outputs


@dequantized_linear.register_fake
def _(
    inputs: Tensor,
    tensors: Sequence[Tensor],
    widths: Sequence[int],
    counts: Sequence[int],
    out_features: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], out_features)


@torch.library.custom_op("slimplus::packed_embedding", mutates_args=())
def packed_embedding(
    tokens: Tensor,
    tensors: Sequence[Tensor],
    widths: Sequence[int],
    counts: Sequence[int],
    vocabulary: int,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
    factor: float,
) -> Tensor:
    """Look up rows of a packed embedding on a GPU, `[tokens, embedding_dim]`.

    Args:
        tokens: `[tokens]`.
        tensors: tensors of the packed format, in the order of `packed_shapes`.
        widths: widths that occur in the weight.
        counts: number of groups of each of them.
        vocabulary: rows of the weight.
        embedding_dim: columns of the weight.
        group_size: columns a group.
        dtype: dtype of the rows.
        factor: a factor on the rounded rows.
    """
    from slimplus.kernels.packed_embedding import packed_embedding as launch  # Triton, as above

    bit_counts = dict(zip(widths, counts, strict=True))
    packed = dict(zip(packed_shapes(vocabulary, bit_counts, group_size), tensors, strict=True))
    with torch.cuda.device_of(tokens):
        return launch(tokens, packed, bit_counts, vocabulary, embedding_dim, group_size, dtype, factor)


@packed_embedding.register_fake
def _(
    tokens: Tensor,
    tensors: Sequence[Tensor],
    widths: Sequence[int],
    counts: Sequence[int],
    vocabulary: int,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
    factor: float,
) -> Tensor:
    return tokens.new_empty(tokens.shape[0], embedding_dim, dtype=dtype)
