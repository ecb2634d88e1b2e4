"""The parts of a causal language model: blocks, linear layers, norms, embedding and head.

Supporting another architecture takes one entry in `BLOCKS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

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
"""`config.model_type` → dotted path of the list of blocks inside the causal language model."""


class UnsupportedModelError(InputError):
    """Error of a model whose architecture cannot be quantized."""


def blocks_path(config: PretrainedConfig) -> str:
    """Return the dotted path of the list of blocks inside the causal language model.

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
    """Return the transformer blocks of a model, in order.

    Raises:
        UnsupportedModelError: for a `model_type` that is not in `BLOCKS`.
    """
    blocks = model.get_submodule(blocks_path(model.config))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def find_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of one block, all of which get quantized, by their dotted names in the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def quantized_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers of all blocks by their dotted names in the model."""
    path = blocks_path(model.config)
    return {f"{path}.{name}": layer for name, layer in find_linears(find_blocks(model)).items()}


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalization, judged by its class's name: every architecture has its own class."""
    return type(module).__name__.endswith("Norm")


def following_norm(model: PreTrainedModel, index: int) -> nn.Module:
    """Return the normalization that reads a block's output: the first one of the next block, or the model's last one.

    Args:
        model: a causal language model.
        index: number of the block, from 0.

    Raises:
        UnsupportedModelError: if no normalization follows the block.
    """
    blocks, path = find_blocks(model), blocks_path(model.config)
    reader = blocks[index + 1] if index + 1 < len(blocks) else model.get_submodule(path.rpartition(".")[0])
    for child in reader.children():
        if is_norm(child):
            return child
    raise UnsupportedModelError(
        f"model.path: no normalization follows block {index}; give training.loss.error=normalized or mse"
    )


@dataclass(frozen=True)
class EmbeddingAndHead:
    """The two large layers outside the blocks.

    Attributes:
        embedding: name of the token embedding.
        head: name of the output head.
        tied: whether embedding and head share one weight.
    """

    embedding: str
    head: str
    tied: bool


def find_embedding_and_head(model: PreTrainedModel) -> EmbeddingAndHead:
    """Return the names of a model's embedding and head.

    Raises:
        UnsupportedModelError: if the two are not a plain embedding and a plain linear layer.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # A subclass may scale the rows that it looks up, and max_norm rescales them: the packed embedding does neither.
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and type(head) is nn.Linear
    if not plain:
        raise UnsupportedModelError(
            f"quantization.embedding_bits, head_bits: the model's {type(embedding).__name__} and {type(head).__name__} "
            "cannot be packed; leave both keys null"
        )
    names = {id(module): name for name, module in model.named_modules()}
    return EmbeddingAndHead(names[id(embedding)], names[id(head)], tied=head.weight is embedding.weight)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model's embedding has rows for."""
    return cast(int, model.get_input_embeddings().num_embeddings)


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has a table of, or None if it computes positions, of which there is no last."""
    embedding = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not embedding]
    longest = getattr(model.config, "max_position_embeddings", None)
    return longest if tables else None


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether a model's embedding and head share one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", False)


def embedding_and_head_bits(
    model: PreTrainedModel, embedding_bits: int | None, head_bits: int | None
) -> dict[str, int]:
    """Return the bits of the layers outside the blocks that get packed, by the layers' names.

    A head that is tied to the embedding is packed with it, once, unless `head_bits` is given too: then embedding and
    head are stored apart.

    Args:
        model: a causal language model.
        embedding_bits: width of the embedding, or None to leave the embedding as it is.
        head_bits: width of the head, or None.

    Raises:
        InputError: if the layers cannot be packed, or `head_bits` alone would split a tied weight for nothing.
    """
    if embedding_bits is None and head_bits is None:
        return {}
    layers = find_embedding_and_head(model)
    if layers.tied and embedding_bits is None:
        raise InputError(
            "quantization.head_bits: the head of this model is its embedding; a packed copy beside the 16-bit weight "
            "would make the checkpoint larger; set quantization.embedding_bits, alone to pack the two as one, or with "
            "head_bits to store them apart"
        )
    bits = {layers.embedding: embedding_bits, layers.head: head_bits}
    return {name: width for name, width in bits.items() if width is not None}
