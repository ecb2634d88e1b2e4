"""Where each supported architecture keeps its transformer blocks: data, looked up by `config.model_type`."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from slimplus.errors import InputError

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
