"""Ordinary layers in the place of packed ones, for what packed layers cannot do: other training, merging, export."""

from __future__ import annotations

import torch
from torch import nn

from slimplus.nn.expert_stack import ExpertStack
from slimplus.nn.packed_embedding import PackedEmbedding, TiedHead
from slimplus.nn.packed_linear import PackedLinear


def replace_packed_layers(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace the packed layers in a module by frozen ordinary ones of `dtype`, wherever they lie, one at a time.

    A head that is tied to a packed embedding shares the weight of the ordinary one. Experts become one module again, as
    transformers has them, unless adapters lie on them.

    Args:
        module: a module with packed layers, not a packed layer itself.
        dtype: dtype of the weights, which are exact in float32, and rounded once to any other.
    """
    embeddings: dict[int, nn.Embedding] = {}
    for name, layer in list(module.named_modules()):
        if isinstance(layer, PackedEmbedding):
            embeddings[id(layer)] = layer.to_embedding(dtype)
            module.set_submodule(name, embeddings[id(layer)])
    for name, layer in list(module.named_modules()):
        if isinstance(layer, TiedHead) and id(layer.embedding) in embeddings:
            module.set_submodule(name, _tied_linear(layer, embeddings[id(layer.embedding)]))
        elif isinstance(layer, PackedLinear):
            module.set_submodule(name, layer.to_linear(dtype))
    for name, stack in list(module.named_modules()):
        if isinstance(stack, ExpertStack) and stack.is_ordinary:
            module.set_submodule(name, stack.fused())


def _tied_linear(head: TiedHead, embedding: nn.Embedding) -> nn.Linear:
    """Return an ordinary head that shares the weight of `embedding`."""
    with torch.device("meta"):
        linear = nn.Linear(head.in_features, head.out_features, bias=False)
    linear.weight = embedding.weight
    if head.bias is not None:
        linear.bias = nn.Parameter(head.bias.detach().to(embedding.weight.dtype))
    return linear.requires_grad_(False)
