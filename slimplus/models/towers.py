"""The parts of a model that reads images or sounds besides text: which of them a text runs through, and which not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:  # transformers imports this package while it is being imported itself
    from transformers import PreTrainedModel


def towers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the models for images or sounds inside a model, by their dotted names; a text does not run through them.

    They are the outermost modules whose configuration is neither the whole model's nor that of its text model.
    """
    own = {model.config.model_type, model.config.get_text_config().model_type}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        kind = _model_type(module)
        if kind is not None and kind not in own and not is_inside(name, found):
            found[name] = module
    return found


def carried_over(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return what belongs to images or sounds in a model, by dotted names: towers, and the projectors behind them.

    Outside the text model it is everything that holds neither the embedding nor the head.
    """
    found, text = towers(model), model.config.get_text_config().model_type
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    steps = next((name for name, module in model.named_modules() if module is ends[0]), "").split(".")
    outer = [".".join(steps[:depth]) for depth in range(len(steps))]  # of the embedding, the whole model first
    inner = (depth for depth, name in enumerate(outer) if _model_type(model.get_submodule(name)) == text)
    for name in outer[: next(inner, 0)]:
        for own, child in model.get_submodule(name).named_children():
            if not any(part is end for part in child.modules() for end in ends):
                found[f"{name}.{own}".removeprefix(".")] = child
    return found


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Return whether a module, by its dotted name, is one of `modules` or inside one of them."""
    return any(f"{name}.".startswith(f"{outer}.") for outer in modules)


def _model_type(module: nn.Module) -> str | None:
    """Return the `model_type` of the configuration that a module holds, or None if it holds none."""
    return getattr(getattr(module, "config", None), "model_type", None)
