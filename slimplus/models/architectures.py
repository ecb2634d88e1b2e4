"""Where each supported architecture keeps its transformer blocks: data, looked up by `config.model_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from slimplus.utils.errors import InputError

if TYPE_CHECKING:  # transformers imports this package while it is being imported itself
    from transformers import PretrainedConfig, PreTrainedModel

BLOCKS = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "opt": "model.decoder.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}
"""`model_type` → path of the list of blocks inside the causal language model."""


class UnsupportedModelError(InputError):
    """The model cannot be quantized here."""


def blocks_path(config: PretrainedConfig) -> str:
    """Dotted path of the list of blocks.

    Raises:
        UnsupportedModelError: for a `model_type` that is not in `BLOCKS`.
    """
    try:
        return BLOCKS[config.model_type]
    except KeyError:
        raise UnsupportedModelError(
            f"model.path: architecture '{config.model_type}' is not supported; supported are {', '.join(BLOCKS)}"
        ) from None


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of `model`, in order."""
    blocks = model.get_submodule(blocks_path(model.config))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def find_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of one block by their dotted name in it: everything that gets quantized."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def quantized_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of all blocks by their names in the model."""
    path = blocks_path(model.config)
    return {f"{path}.{name}": layer for name, layer in find_linears(find_blocks(model)).items()}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization; transformers has a class of its own for every architecture."""
    return type(module).__name__.endswith("Norm")


def following_norm(model: PreTrainedModel, index: int) -> nn.Module:
    """The normalization that reads the output of block `index`: the next block's first one, or the model's last.

    Raises:
        UnsupportedModelError: if there is none.
    """
    blocks, path = find_blocks(model), blocks_path(model.config)
    reader = blocks[index + 1] if index + 1 < len(blocks) else model.get_submodule(path.rpartition(".")[0])
    for child in reader.children():
        if is_norm(child):
            return child
    raise UnsupportedModelError(f"model.path: no normalization follows block {index}; give another training.loss.error")


@dataclass(frozen=True)
class EmbeddingAndHead:
    """The two large layers outside the blocks.

    Attributes:
        embedding: name of the token embedding.
        head: name of the output head.
        tied: whether they share one weight.
    """

    embedding: str
    head: str
    tied: bool


def find_embedding_and_head(model: PreTrainedModel) -> EmbeddingAndHead:
    """Embedding and head of `model`.

    Raises:
        UnsupportedModelError: if they are no plain embedding and linear layer.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # A subclass may scale what it looks up, and max_norm changes it: the packed embedding does neither.
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and type(head) is nn.Linear
    if not plain:
        raise UnsupportedModelError(
            f"quantization.embedding_bits, head_bits: the model's {type(embedding).__name__} and {type(head).__name__} "
            "cannot be packed; leave both keys null"
        )
    names = {id(module): name for name, module in model.named_modules()}
    return EmbeddingAndHead(names[id(embedding)], names[id(head)], tied=head.weight is embedding.weight)


def embedding_and_head_bits(
    model: PreTrainedModel, embedding_bits: int | None, head_bits: int | None
) -> dict[str, int]:
    """Name → bits of the layers outside the blocks that get packed.

    A head tied to the embedding is packed with it, once, unless it has bits of its own: then the two are stored apart.

    Raises:
        InputError: if the model has no such layers, or `head_bits` alone would split a tied weight for nothing.
    """
    if embedding_bits is None and head_bits is None:
        return {}
    layers = find_embedding_and_head(model)
    if layers.tied and embedding_bits is None:
        raise InputError(
            "quantization.head_bits: the head of this model is its embedding; packed apart from a 16-bit one it would "
            "only add to the checkpoint; set quantization.embedding_bits, alone to pack the two as one, "
            "or with head_bits to store them apart"
        )
    bits = {layers.embedding: embedding_bits, layers.head: head_bits}
    return {name: width for name, width in bits.items() if width is not None}
