"""An embedding that keeps its weight bit-packed, and the output head tied to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight
from slimplus.format.planes import ROW_MULTIPLE, check_features, count_bits, pack, packed_shapes, stored_scale_bits
from slimplus.nn.packed_linear import PackedLinear, PackedModule, dequantize_packed


class PackedEmbedding(PackedModule):
    """`nn.Embedding` for inference over the packed format of `slimplus.format.planes`: a row a token.

    A lookup gathers the packed columns of the tokens asked for and dequantizes nothing else. Rows are innermost in the
    format, so that a gather of its last dimension gives a small packed weight with those rows.

    Args:
        num_embeddings: tokens.
        embedding_dim: values a token.
        group_size: values a group.
        bit_counts: number of groups of each width; it fixes the shape of every buffer.
        dtype: of what a lookup gives; the default one if None.
        scale_bits: that a scale takes.

    Raises:
        ValueError: if `bit_counts` does not describe `embedding_dim` values.
    """

    scales: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group_size: int,
        bit_counts: Mapping[int, int],
        dtype: torch.dtype | None = None,
        scale_bits: int = 16,
    ) -> None:
        super().__init__()
        check_features(embedding_dim, bit_counts, group_size)
        self.num_embeddings, self.embedding_dim, self.group_size = num_embeddings, embedding_dim, group_size
        self.bit_counts, self.dtype = dict(bit_counts), dtype or torch.get_default_dtype()
        for name, (shape, tensor_dtype) in packed_shapes(num_embeddings, bit_counts, group_size, scale_bits).items():
            self.register_buffer(name, torch.zeros(shape, dtype=tensor_dtype))

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Self:
        """Pack `weight` `[num_embeddings, embedding_dim]`. The module lies on the CPU."""
        tensors, (rows, columns) = pack(weight), weight.integers.shape
        with torch.device("meta"):
            counts = count_bits(tensors["group_bits"])
            module = cls(rows, columns, weight.group_size, counts, dtype, stored_scale_bits(tensors))
        module.load_state_dict(tensors, assign=True)
        return module

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, `[num_embeddings, embedding_dim]`."""
        return self.num_embeddings, self.embedding_dim

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[num_embeddings, embedding_dim]`; exact in float32, rounded once to any other dtype."""
        return self._dequantize(self.packed_tensors(), self.num_embeddings, dtype)

    def _dequantize(self, tensors: Mapping[str, Tensor], rows: int, dtype: torch.dtype) -> Tensor:
        return dequantize_packed(tensors, self.bit_counts, (rows, self.embedding_dim), self.group_size, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` `[...]` → `[..., embedding_dim]`, bit for bit the rows of `dequantize`.

        Raises:
            IndexError, RuntimeError: on the CPU, for a token outside the vocabulary.
        """
        count = tokens.numel()
        asked = nn.functional.pad(tokens.flatten(), (0, -count % ROW_MULTIPLE))
        gathered = {
            name: tensor[:, : self.num_embeddings].index_select(1, asked) if tensor.dim() == 2 else tensor
            for name, tensor in self.packed_tensors().items()
        }
        rows = self._dequantize(gathered, count, self.dtype)
        return rows.contiguous().view(*tokens.shape, self.embedding_dim)

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype  # what a cast would make of an ordinary weight
        return super()._apply(function, recurse)

    def extra_repr(self) -> str:
        widths = ", ".join(f"{count}×{width}-bit" for width, count in self.bit_counts.items())
        return f"{self.num_embeddings}, {self.embedding_dim}, group_size={self.group_size}, groups=({widths})"


class TiedHead(PackedLinear):
    """The output head of a model whose head is its embedding, packed: it stores nothing of its own but a bias.

    Args:
        embedding: whose packed tensors it multiplies by.
        bias: `[num_embeddings]` or None.
    """

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self._embedding = (embedding,)  # in a tuple it is no submodule: saved and moved where it is, and only there
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.group_size, self.bit_counts = embedding.group_size, embedding.bit_counts
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        """As of any packed layer, on the embedding's device, which a `device_map` may have made another one."""
        return super().forward(inputs.to(self.scales.device)).to(inputs.device)

    @property
    def scales(self) -> Tensor:  # type: ignore[override]
        """The embedding's."""
        return self._embedding[0].scales

    def packed_tensors(self) -> dict[str, Tensor]:
        """The embedding's."""
        return self._embedding[0].packed_tensors()

    def replace_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the embedding's."""
        self._embedding[0].replace_tensors(tensors)
