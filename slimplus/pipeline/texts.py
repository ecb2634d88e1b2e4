"""The texts of a run: what it calibrates on, and what it measures perplexity on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.data.text import SELF, Text, characters_to_read, read_text
from slimplus.data.windows import Packing, Windows, WrittenText, calibration_windows, chat_renderer
from slimplus.evaluation.texts import EvaluationText, read_evaluation_text
from slimplus.pipeline.configs import text_config
from slimplus.pipeline.self_text import SelfText
from slimplus.recipe.schema import Recipe
from slimplus.run_dir.directory import numbered
from slimplus.utils.errors import keys_renamed


def calibration_texts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, own: SelfText | None = None
) -> list[Text | WrittenText]:
    """Return the calibration texts, of which no more is read than the windows can need.

    Args:
        recipe: the resolved recipe.
        tokenizer: the model's tokenizer.
        own: the text that the model writes, if the recipe asks for it.
    """
    render_chat, limit = chat_renderer(tokenizer), characters_limit(recipe)
    return [
        own.text
        if own is not None and source.path == SELF
        else read_text(source.path, "calibration", source.column, limit, render_chat, source.weight)
        for source in recipe.data.calibration.sources
    ]


def characters_limit(recipe: Recipe) -> int:
    """Return how many characters of a calibration text to read."""
    return characters_to_read(recipe.data.samples * recipe.data.sequence_length)


def windows_to_calibrate(
    recipe: Recipe, texts: Sequence[Text | WrittenText], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Windows:
    """Return the calibration windows, which are kept in `folder`."""
    data = recipe.data
    file, packing = folder / "calibration.safetensors", Packing(data.bos, data.separator)
    return calibration_windows(texts, tokenizer, data.samples, data.sequence_length, recipe.seed, file, packing)


def evaluation_texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[EvaluationText]:
    """Return the texts that perplexity is measured on, whose windows are kept in `folder`."""
    found = []
    for index, (key, section) in enumerate(recipe.evaluation_texts.items()):
        with keys_renamed({"data.evaluation": key, "data.bos": f"{key}.bos"}):
            cache = folder / numbered("evaluation.safetensors", index)
            found.append(read_evaluation_text(text_config(section), tokenizer, cache))
    return found
