"""The ways in which vLLM's layers load and apply packed weights: linear layers, embeddings and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase

from slimplus.format.planes import count_bits, stored_scale_bits
from slimplus.hub.engine_layers import LoadedPart, PackedLinears, PartLoader, StoredLayer, rows_of_rank, unshared_rows
from slimplus.nn import PackedLinear
from slimplus.nn.packed_embedding import PackedEmbedding, TiedHead
from slimplus.nn.packed_linear import WeightDescription


class PackedMethod(LinearMethodBase):
    """What the methods for linear layers, embeddings and heads share.

    Args:
        stored: layers of the checkpoint that vLLM's layer holds, in vLLM's order.
    """

    def __init__(self, stored: Sequence[StoredLayer]) -> None:
        self.stored = tuple(stored)
        self.name = f"{METHOD_PREFIX}{stored[0].name}"
        self.loader = PartLoader(stored)
        self._dtype = torch.bfloat16

    def _prepare(self, layer: nn.Module, parts: Sequence[LoadedPart], dtype: torch.dtype) -> None:
        """Have `layer` take the tensors of these parts, and apply them where vLLM's operators find it by name."""
        self._dtype = dtype
        self.loader.expect(layer, parts)
        for name in {name for one in self.stored for name, (shape, _) in one.tensors.items() if len(shape) == 2}:
            layer.get_parameter(name).output_dim = 1  # type: ignore[attr-defined] # by which some models permute rows
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = layer


METHOD_PREFIX = "slimplus:"
"""What sets the packed layers apart among the names in vLLM's forward context."""


class PackedLinearMethod(PackedMethod):
    """The method of vLLM's linear layers, which hold one or more packed layers."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Prepare `layer` for the tensors of the packed format.

        Args:
            layer: vLLM's layer.
            input_size_per_partition: columns of the weight on this rank.
            output_partition_sizes: rows on this rank, of each of the layers that vLLM's layer holds.
            input_size: columns of the weight.
            output_size: rows of all these layers.
            params_dtype: dtype of the activations.
            **_: further arguments of vLLM, which have no meaning here.

        Raises:
            ValueError: naming the layer, if the rows of the checkpoint cannot be shared out so.
        """
        self._out_features = sum(output_partition_sizes)
        first = layer.tp_rank * input_size_per_partition if input_size_per_partition != input_size else 0
        columns = range(first, first + input_size_per_partition)
        rows = rows_of_rank(
            [one.shape[0] for one in self.stored],
            output_partition_sizes,
            layer.tp_rank,
            layer.tp_size,
            getattr(layer, "num_kv_head_replicas", 1),
        )
        if rows is None:
            raise unshared_rows(self.stored, output_partition_sizes, layer.tp_size, "vLLM")
        parts = [LoadedPart(one, own, columns) for one, own in zip(self.stored, rows, strict=True)]
        self._prepare(layer, parts, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make packed layers of the tensors that were loaded."""
        layer.packed = PackedLinears(self.loader.take(layer), self._dtype)
        layer.qweight = layer.packed.layers[0].qweight  # by which vLLM's LoRA layers find the device

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply `x` `[..., in]` by the packed layers, `[..., sum of out]`."""
        outputs = vllm_linear(x, self.name, self._out_features)
        return outputs if bias is None else outputs + bias


class PackedVocabularyMethod(PackedMethod):
    """The method of a packed embedding or head.

    Args:
        stored: the layer in the checkpoint.
        is_head: whether it is a head with a weight of its own.
        tied: whether it is an embedding whose weight the head shares.
    """

    def __init__(self, stored: StoredLayer, is_head: bool, tied: bool) -> None:
        super().__init__([stored])
        self.is_head, self.tied = is_head, tied

    def create_weights(self, layer: Any, *_: Any, params_dtype: torch.dtype, **__: Any) -> None:
        """Prepare `layer` for the tensors of the packed format.

        Raises:
            ValueError: if the vocabulary is too small for so many ranks.
        """
        (stored,) = self.stored
        rows = range(layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index)
        if not rows:
            raise ValueError(
                f"{stored.name}: a vocabulary of {stored.shape[0]} leaves nothing for rank {layer.tp_rank} of "
                f"{layer.tp_size}; choose a smaller --tensor-parallel-size"
            )
        self._prepare(layer, [LoadedPart(stored, [rows], range(stored.shape[1]))], params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make a packed embedding or a packed head, or both, of the tensors that were loaded."""
        (packed,) = self.loader.take(layer)
        layer.weight = WeightDescription(torch.Size(packed.shape), self._dtype, packed.scales.device)
        if self.is_head:
            layer.head = PackedLinears([packed], self._dtype)
            return
        layer.packed = embedding = _as_embedding(packed, self._dtype)
        if self.tied:
            layer.head = PackedLinears([TiedHead(embedding)], self._dtype)

    def embedding(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """Look up `tokens` `[...]`: their rows `[..., embedding_dim]`."""
        return vllm_embedding(tokens, self.name, self.stored[0].shape[1], self._dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply `x` `[..., in]` by the head; vLLM wants logits for the padding of the vocabulary too."""
        logits: Tensor = layer.head(x)
        logits = nn.functional.pad(logits, (0, layer.num_embeddings_per_partition - logits.shape[-1]))
        return logits if bias is None else logits + bias


class TiedHeadMethod(LinearMethodBase):
    """The method of a head that shares the weight of a packed embedding: vLLM takes the embedding in its place."""

    def create_weights(self, *_: Any, **__: Any) -> None:
        """Create nothing."""

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """Return the embedding, which multiplies as well, with the bias of the head, for which some models ask."""
        embed_tokens.bias = layer.bias
        return embed_tokens

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Raise an error: the model does not tie its head."""
        raise ValueError("this model of vLLM does not tie its head; quantize with quantization.embedding_bits=null")


def _as_embedding(packed: PackedLinear, dtype: torch.dtype) -> PackedEmbedding:
    """Return an embedding that looks up the rows of `packed` in `dtype`."""
    tensors = packed.packed_tensors()
    with torch.device("meta"):
        counts, scale_bits = count_bits(tensors["group_bits"]), stored_scale_bits(tensors)
        embedding = PackedEmbedding(*packed.shape, packed.group_size, counts, dtype, scale_bits)
    embedding.load_state_dict(tensors, assign=True)
    return embedding


def _packed_layer(name: str) -> Any:
    return get_forward_context().no_compile_layers[name].packed


@torch.library.custom_op("slimplus::vllm_linear", mutates_args=())
def vllm_linear(inputs: Tensor, name: str, out_features: int) -> Tensor:
    """Multiply `inputs` `[..., in]` by the packed layers in the layer `name` of vLLM, `[..., out_features]`.

    It is one operator because vLLM's compiler must not see that few rows are multiplied otherwise than many.
    """
    outputs: Tensor = _packed_layer(name)(inputs)
    return outputs


@vllm_linear.register_fake
def _(inputs: Tensor, name: str, out_features: int) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], out_features)


@torch.library.custom_op("slimplus::vllm_embedding", mutates_args=())
def vllm_embedding(tokens: Tensor, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    """Look up `tokens` `[...]` in the packed embedding `name` of vLLM: their rows `[..., columns]` in `dtype`."""
    rows: Tensor = _packed_layer(name)(tokens)
    return rows


@vllm_embedding.register_fake
def _(tokens: Tensor, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    return tokens.new_empty(*tokens.shape, columns, dtype=dtype)
