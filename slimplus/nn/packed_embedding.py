"""An embedding that keeps its weight bit-packed, and the output head that is tied to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight
from slimplus.format.planes import ROW_MULTIPLE, check_features, count_bits, pack, packed_shapes, stored_scale_bits
from slimplus.nn.backends.triton import packed_embedding
from slimplus.nn.packed_linear import PackedLinear, PackedModule, dequantize_packed


class PackedEmbedding(PackedModule):
    """`nn.Embedding` for inference over the packed format of `slimplus.format.planes`: a row of the weight a token.

    A lookup dequantizes only the rows of its tokens. Rows are the last dimension of packed tensors, so that gathering
    along it gives a small packed weight with those rows.

    Args:
        num_embeddings: tokens of the vocabulary.
        embedding_dim: values a token.
        group_size: values a group.
        bit_counts: number of groups of each width; it fixes the shape of every buffer.
        dtype: dtype of the values that a lookup returns; None takes PyTorch's default.
        scale_bits: bits that a scale takes, 8 or 16.
        embed_scale: factor on the rows that a lookup returns, rounded to their dtype, as in Gemma.

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
        embed_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed_scale = embed_scale
        check_features(embedding_dim, bit_counts, group_size)
        self.num_embeddings, self.embedding_dim, self.group_size = num_embeddings, embedding_dim, group_size
        self.bit_counts, self.dtype = dict(bit_counts), dtype or torch.get_default_dtype()
        for name, (shape, tensor_dtype) in packed_shapes(num_embeddings, bit_counts, group_size, scale_bits).items():
            self.register_buffer(name, torch.zeros(shape, dtype=tensor_dtype))

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Self:
        """Return an embedding on the CPU with the packed `weight` `[num_embeddings, embedding_dim]`."""
        tensors, (rows, columns) = pack(weight), weight.integers.shape
        with torch.device("meta"):
            counts = count_bits(tensors["group_bits"])
            module = cls(rows, columns, weight.group_size, counts, dtype, stored_scale_bits(tensors))
        module.load_state_dict(tensors, assign=True)
        return module

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, `[num_embeddings, embedding_dim]`."""
        return self.num_embeddings, self.embedding_dim

    @property
    def _factor(self) -> float:
        """The scale, rounded to the dtype of the rows; a number, since a graph cannot capture the copy of a tensor."""
        return _round(self.embed_scale, self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `[num_embeddings, embedding_dim]`, exact in float32, rounded once to any other dtype."""
        return self._dequantize(self.packed_tensors(), self.num_embeddings, dtype)

    def to_embedding(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:
        """Return an ordinary embedding of `dtype` with the same weight."""
        weight = self.dequantize(dtype).contiguous()
        if self.embed_scale == 1:
            return nn.Embedding.from_pretrained(weight)
        embedding = ScaledEmbedding.from_pretrained(weight)
        embedding.embed_scale = self.embed_scale
        return embedding

    def _dequantize(self, tensors: Mapping[str, Tensor], rows: int, dtype: torch.dtype) -> Tensor:
        return dequantize_packed(tensors, self.bit_counts, (rows, self.embedding_dim), self.group_size, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up `tokens` `[...]`: their rows `[..., embedding_dim]`, bit for bit those of `dequantize` times a scale.

        On a GPU the row of a token outside the vocabulary holds NaN.

        Raises:
            RuntimeError: for a token outside the vocabulary, on the CPU.
        """
        rows = self._launch(tokens) if tokens.is_cuda else self._gather(tokens)
        return rows.view(*tokens.shape, self.embedding_dim)

    def _gather(self, tokens: Tensor) -> Tensor:
        """Return the scaled rows of tokens, `[tokens, embedding_dim]`, from a small packed weight with those alone."""
        count = tokens.numel()
        padded = nn.functional.pad(tokens.flatten(), (0, -count % ROW_MULTIPLE))
        gathered = {
            name: tensor[:, : self.num_embeddings].index_select(1, padded) if tensor.dim() == 2 else tensor
            for name, tensor in self.packed_tensors().items()
        }
        rows = self._dequantize(gathered, count, self.dtype).contiguous()
        return rows if self.embed_scale == 1 else rows * self._factor

    def _launch(self, tokens: Tensor) -> Tensor:
        """Return the scaled rows of tokens, `[tokens, embedding_dim]`, from one launch."""
        packed = self.packed_tensors()
        rows: Tensor = packed_embedding(
            tokens.flatten(),
            [packed[name] for name in packed_shapes(self.num_embeddings, self.bit_counts, self.group_size)],
            list(self.bit_counts),
            list(self.bit_counts.values()),
            self.num_embeddings,
            self.embedding_dim,
            self.group_size,
            self.dtype,
            self._factor,
        )
        return rows

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype  # a cast changes it as it changes a dense weight
        return super()._apply(function, recurse)

    def extra_repr(self) -> str:
        """Return the sizes and widths that `repr` of the module shows."""
        widths = ", ".join(f"{count}×{width}-bit" for width, count in self.bit_counts.items())
        return f"{self.num_embeddings}, {self.embedding_dim}, group_size={self.group_size}, groups=({widths})"


@torch.compiler.assume_constant_result
def _round(value: float, dtype: torch.dtype) -> float:
    """Round a number to a dtype."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


class ScaledEmbedding(nn.Embedding):
    """`nn.Embedding` whose lookups are multiplied by `embed_scale`, rounded to the dtype of the weight, as in Gemma."""

    embed_scale = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up `tokens` `[...]`: their rows times the scale, `[..., embedding_dim]`."""
        return super().forward(tokens) * self.weight.new_tensor(self.embed_scale)


class TiedHead(PackedLinear):
    """The output head of a model that ties it to a packed embedding; the head stores nothing but a bias.

    Args:
        embedding: the embedding whose packed weight the head shares.
        bias: the bias, `[num_embeddings]`, or None.
    """

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self._embedding = (embedding,)  # in a tuple, so that it is not a submodule, which would be saved twice
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.group_size, self.bit_counts, self.dtype = embedding.group_size, embedding.bit_counts, embedding.dtype
        self.bias = bias

    @property
    def embedding(self) -> PackedEmbedding:
        """The embedding whose packed weight the head shares."""
        return self._embedding[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]` as any packed layer does, on the embedding's device, if it is another one."""
        return super().forward(inputs.to(self.scales.device)).to(inputs.device)

    @property
    def scales(self) -> Tensor:  # type: ignore[override]
        """The scales of the embedding."""
        return self.embedding.scales

    def packed_tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors of the embedding by name."""
        return self.embedding.packed_tensors()

    def replace_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the packed tensors of the embedding by others of the same values."""
        self.embedding.replace_tensors(tensors)
