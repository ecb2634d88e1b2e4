"""The parts of a causal language model: blocks, linear layers, norms, embedding and head.

Parts are inferred from the model, with the few exceptions below by name. The self-check of
`slimplus.pipeline.self_check` tells whether what was inferred is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from slimplus.models.shrink import number_of_blocks
from slimplus.models.towers import carried_over, is_inside, towers
from slimplus.nn.expert_stack import ExpertStack, expert_layout
from slimplus.utils.errors import InputError

if TYPE_CHECKING:  # transformers imports this package while it is being imported itself
    from transformers import PretrainedConfig, PreTrainedModel

MIN_ROWS = 32
"""Rows of the smallest linear layer that is packed: gates of a few rows save nothing and decide much."""

SKIPPED = {
    "a router or a gate of experts": ("gate", "*.gate", "*router*", "*shared_expert_gate"),
    "an indexer, which chooses the tokens to attend to": ("*indexer*",),
    "a projection to the few values that steer a recurrence": (
        *("*mamba.x_proj", "*mixer.x_proj", "*mamba.dt_proj", "*mixer.dt_proj", "*in_proj_a", "*in_proj_b"),
        *("*in_proj_ba", "*ssm.x_proj", "*ssm.dt_proj"),
    ),
}
"""Why a linear layer stays at 16 bit → globs of the names of such layers in a block."""

LINEAR_CLASSES = {"Conv1D": True, "FalconLinear": False}
"""Classes of transformers that multiply as `nn.Linear` does → whether they store the weight transposed."""


ONE_WINDOW_AT_A_TIME = {
    "bloom",
    "cpmant",
    "deepseek_v4",
    "falcon",  # of its variants, those with ALiBi
    "inkling2_text",
    "mvp",
    "trocr",
    "xglm",
}
"""`model_type` of the text configurations whose blocks do not run several windows at once.

An argument of these blocks has a size of windows times heads.
"""


class UnsupportedModelError(InputError):
    """Error of a model whose architecture cannot be quantized."""


def runs_batches(model: PreTrainedModel) -> bool:
    """Return whether the blocks of a model run several windows at once."""
    return model.config.get_text_config().model_type not in ONE_WINDOW_AT_A_TIME


def blocks_path(model: PreTrainedModel) -> str:
    """Return the dotted path of the list of blocks inside the causal language model.

    Of the lists of modules that are not inside another list it is the one with the most parameters, among those of the
    length that the text configuration gives, if there are any.

    Raises:
        UnsupportedModelError: if the model has no list of blocks with linear layers.
    """
    others = towers(model)
    lists = [found for found in _outermost_lists(model, "") if not is_inside(found[0], others)]
    if not lists:
        kind = model.config.model_type
        raise UnsupportedModelError(f"model.path: architecture '{kind}' is not supported: it has no list of blocks")
    count = number_of_blocks(model.config.get_text_config())
    fitting = [found for found in lists if len(found[1]) == count] or lists
    return max(fitting, key=lambda found: sum(parameter.numel() for parameter in found[1].parameters()))[0]


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules that are not inside another list, by their dotted names."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the transformer blocks of a model, in order.

    Raises:
        UnsupportedModelError: if the model has no list of blocks with linear layers.
    """
    blocks = model.get_submodule(blocks_path(model))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def find_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of one block that get quantized, by their dotted names in the block.

    They are of the very class `nn.Linear`, since a subclass may use its weight in another way (`plain_linears` turns
    those that do not into it); routers, gates, indexers and layers of few rows are left out.
    """
    return {
        name: module
        for name, module in block.named_modules()
        if type(module) is nn.Linear and reason_to_skip(name, module) is None
    }


def reason_to_skip(name: str, layer: nn.Linear) -> str | None:
    """Return why a linear layer of a block stays at 16 bit, or None for a layer that gets packed."""
    if layer.out_features < MIN_ROWS:
        return f"fewer than {MIN_ROWS} rows"
    return skipped_by_name(name)


def skipped_by_name(name: str) -> str | None:
    """Return why a layer of a block stays at 16 bit by its name, or None."""
    for reason, globs in SKIPPED.items():
        if any(fnmatchcase(name, glob) for glob in globs):
            return reason
    return None


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """Return the shape `[out, in]` of the weight of a layer that multiplies as `nn.Linear` does, or None for others."""
    weight: Any = getattr(layer, "weight", None)
    if type(layer) is nn.Linear:
        return layer.out_features, layer.in_features
    if (transposed := LINEAR_CLASSES.get(type(layer).__name__)) is None or weight is None or weight.dim() != 2:
        return None
    rows, columns = weight.shape
    return (columns, rows) if transposed else (rows, columns)


def left_out(block: nn.Module) -> dict[str, str]:
    """Return why each weight of a block with more than one dimension stays at 16 bit, by the weight's name."""
    packed, reasons = find_linears(block), dict[str, str]()
    for name, module in block.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or name in packed:
                continue
            if type(module) is nn.Linear:
                reason = reason_to_skip(name, module) or ""
            elif parameter.dim() == 3 and "expert" in f"{name}.{key}":
                reason = f"a stack {list(parameter.shape)} of experts' weights, whose layout is not known"
            else:
                reason = f"a {type(module).__name__}, not a linear layer"
            reasons[f"{name}.{key}".removeprefix(".")] = reason
    return reasons


def packed_share(model: PreTrainedModel) -> float:
    """Return the share of the weights in the blocks that get packed."""
    blocks = find_blocks(model)
    weights = {id(layer.weight): layer.weight.numel() for layer in find_linears(blocks).values()}  # some blocks share
    packed = sum(weights.values())
    return packed / max(sum(parameter.numel() for parameter in blocks.parameters()), 1)


def plain_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Replace what multiplies as `nn.Linear` does in the blocks by `nn.Linear`, and return the model.

    A weight that is stored transposed (`Conv1D` of GPT-2) becomes a view `[out, in]` of the same memory. So do the
    weights of experts, a view for each expert, see `ExpertStack`.
    """
    blocks = find_blocks(model)
    for name, module in list(blocks.named_modules()):
        if _packs_experts(name.partition(".")[2], module):
            blocks.set_submodule(name, ExpertStack(module))
        if (transposed := LINEAR_CLASSES.get(type(module).__name__)) is None:
            continue
        weight: Any = module.weight
        weight = nn.Parameter(weight.data.t() if transposed else weight.data, requires_grad=weight.requires_grad)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
        linear.weight, linear.bias = weight, module.bias
        if reason_to_skip(name.partition(".")[2], linear) is None:
            blocks.set_submodule(name, linear.train(module.training))
    return model


def _packs_experts(name: str, module: nn.Module) -> bool:
    """Return whether a module of a block holds experts of a known layout, whose layers all get packed."""
    layout = expert_layout(module)
    if layout is None:
        return False
    rows = (getattr(module, key).shape[2 if layout.transposed else 1] for key in layout.projections)
    return min(rows) >= MIN_ROWS and not any(skipped_by_name(f"{name}.{key}.0") for key in layout.projections)


def expert_stacks(module: nn.Module) -> dict[str, ExpertStack]:
    """Return the experts in a module by their dotted names."""
    return {name: child for name, child in module.named_modules() if isinstance(child, ExpertStack)}


def stack_of_layers(module: nn.Module) -> dict[str, str]:
    """Return the name of the projection that each expert's layer belongs to, by the layer's name in a module.

    The layers of a projection have the same shape, and keep equal numbers of groups of each width.
    """
    return {
        f"{name}.{projection}.{expert}": f"{name}.{projection}".removeprefix(".")
        for name, stack in expert_stacks(module).items()
        for projection in stack.layout.projections
        for expert in range(stack.count)
    }


def quantized_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers of all blocks that get quantized, by their dotted names in the model."""
    path = blocks_path(model)
    return {
        f"{path}.{index}.{name}": layer
        for index, block in enumerate(find_blocks(model))
        for name, layer in find_linears(block).items()
    }


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalization, judged by its class's name: every architecture has its own class."""
    return re.search(r"Norm(1P|Gated|\dd)?$", type(module).__name__) is not None


def text_norms(model: PreTrainedModel) -> list[nn.Module]:
    """Return the normalizations that a text runs through."""
    others = carried_over(model)
    return [module for name, module in model.named_modules() if is_norm(module) and not is_inside(name, others)]


def following_norm(model: PreTrainedModel, index: int, block: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """Return the normalization that reads a block's output: the first one of the next block, or the model's last one.

    Norms called `post_…` read what a part of the block gives, not the block's input.

    Args:
        model: a causal language model.
        index: number of the block, from 0.
        block: function that gives a block with its weights, where the model's are on the meta device.

    Raises:
        UnsupportedModelError: if no normalization follows the block.
    """
    blocks, path = find_blocks(model), blocks_path(model)
    if index + 1 < len(blocks):
        norms = list(_norms(block(index + 1) if block else blocks[index + 1]))
    else:  # a norm of the embeddings comes first
        norms = list(_norms(model.get_submodule(path.rpartition(".")[0])))[::-1]
    if norms:
        return norms[0]
    raise UnsupportedModelError(
        f"model.path: no normalization follows block {index}; give training.loss.error=normalized or mse"
    )


def _norms(module: nn.Module) -> Iterable[nn.Module]:
    """Yield the norms among a module's children, but those that read the output of a part of the module."""
    return (child for name, child in module.named_children() if is_norm(child) and not name.startswith("post_"))


@dataclass(frozen=True)
class EmbeddingAndHead:
    """The two large layers outside the blocks.

    Attributes:
        embedding: name of the token embedding.
        head: name of the output head.
    """

    embedding: str
    head: str


def embedding_scale(embedding: nn.Module) -> float | None:
    """Return the factor on the rows that an embedding looks up, or None for a module that does more than that.

    Gemma's embeddings scale their rows.
    """
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:  # max_norm rescales rows as well
        return None
    if type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", None)
    return float(scale) if type(embedding).__name__.endswith("TextScaledWordEmbedding") and scale is not None else None


def _is_per_layer(name: str, module: nn.Module) -> bool:
    """Return whether a module holds the embeddings that Gemma 3n and 4 add in each block, in one table for all."""
    return name.rpartition(".")[2] == "embed_tokens_per_layer" and embedding_scale(module) is not None


def find_embedding_and_head(model: PreTrainedModel) -> EmbeddingAndHead:
    """Return the names of a model's embedding and head.

    Raises:
        UnsupportedModelError: if the two are not an embedding, which may scale its rows, and a plain linear layer.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding_scale(embedding) is None or type(head) is not nn.Linear:
        raise UnsupportedModelError(
            f"quantization.embedding_bits, head_bits: the model's {type(embedding).__name__} and {type(head).__name__} "
            "cannot be packed; leave both keys null"
        )
    names = {id(module): name for name, module in model.named_modules()}
    return EmbeddingAndHead(names[id(embedding)], names[id(head)])


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model's embedding has rows for."""
    return cast(int, model.get_input_embeddings().num_embeddings)


def too_long(config: PretrainedConfig, key: str, length: int) -> str | None:
    """Return the sentence on windows that are longer than a model's context, or None if they are not.

    Args:
        config: the model's configuration.
        key: key of the recipe that gives their length.
        length: tokens in a window.
    """
    longest = context_length(config)
    if longest is None or length <= longest:
        return None
    return f"{key}: {length} tokens are more than the model takes; give at most {longest}"


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many positions a model was made for, or None if its configuration does not say."""
    return cast("int | None", getattr(config.get_text_config(), "max_position_embeddings", None))


def position_table(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has a table of, or None if it computes positions, of which there is no last."""
    embedding = model.get_input_embeddings()
    others = carried_over(model)
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not embedding
        if not (_is_per_layer(name, module) or is_inside(name, others))
    ]
    return context_length(model.config) if tables else None


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether a model's embedding and head share one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", False)


def set_tied(config: PretrainedConfig, tied: bool) -> None:
    """Set in a configuration, and in that of its text model, whether embedding and head share one weight."""
    config.tie_word_embeddings = tied
    if hasattr(text := config.get_text_config(), "tie_word_embeddings"):
        text.tie_word_embeddings = tied


def embedding_and_head_bits(
    model: PreTrainedModel, tied: bool, embedding_bits: int | None, head_bits: int | None
) -> dict[str, int]:
    """Return the bits of the layers outside the blocks that get packed, by the layers' names.

    A head that is tied to the embedding is packed with it, once, unless `head_bits` is given too: then embedding and
    head are stored apart.

    Args:
        model: a causal language model; it may lie on the meta device.
        tied: whether its embedding and head share one weight.
        embedding_bits: width of the embedding, and of embeddings for each block; None leaves them as they are.
        head_bits: width of the head, or None.

    Raises:
        InputError: if the layers cannot be packed, or `head_bits` alone would split a tied weight for nothing.
    """
    if embedding_bits is None and head_bits is None:
        return {}
    layers = find_embedding_and_head(model)
    if tied and embedding_bits is None:
        raise InputError(
            "quantization.head_bits: the head of this model is its embedding; a packed copy beside the 16-bit weight "
            "would make the checkpoint larger; set quantization.embedding_bits, alone to pack the two as one, or with "
            "head_bits to store them apart"
        )
    by_layer = [name for name, module in model.named_modules() if _is_per_layer(name, module)]
    bits = dict.fromkeys((layers.embedding, *by_layer), embedding_bits) | {layers.head: head_bits}
    return {name: width for name, width in bits.items() if width is not None}
