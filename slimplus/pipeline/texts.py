"""The texts of a run: what it calibrates on, and what it measures perplexity on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.data.text import SELF, Text, characters_to_read, read_text
from slimplus.data.windows import Packing, Windows, WrittenText, calibration_windows, chat_renderer
from slimplus.evaluation.texts import EvaluationText, read_evaluation_text
from slimplus.models.loading import ModelSource
from slimplus.pipeline.configs import text_config
from slimplus.pipeline.self_text import SelfText, self_text
from slimplus.recipe.schema import Recipe
from slimplus.run_dir.directory import numbered
from slimplus.utils.errors import keys_renamed

BLOCKS, END_TO_END = "blocks", "end_to_end"  # the stages that windows are drawn for
FILES = {
    BLOCKS: ("calibration.safetensors", "self.safetensors"),
    END_TO_END: ("end_to_end.safetensors", "end_to_end_self.safetensors"),
}
"""Stage → files of its windows, and of what the model writes for it."""


@dataclass(frozen=True)
class Draw:
    """Windows to draw from the calibration texts for a training, and those texts.

    Attributes:
        name: `BLOCKS` or `END_TO_END`.
        recipe: the recipe, in which `data.samples` is the number of these windows.
        texts: the texts, of which no more is read than the windows can need.
        own: the text that the model writes, if it is one of them.
    """

    name: str
    recipe: Recipe
    texts: list[Text | WrittenText]
    own: SelfText | None

    def windows(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Windows:
        """Return the windows, which are kept in `folder`.

        Raises:
            InputError: if a text is shorter than its share of the windows.
        """
        recipe, data = self.recipe, self.recipe.data
        file, packing = folder / FILES[self.name][0], Packing(data.bos, data.separator)
        with named(self.name, recipe):
            sizes = data.samples, data.sequence_length, recipe.seed
            return calibration_windows(self.texts, tokenizer, *sizes, file, packing)

    @property
    def shares(self) -> dict[str, int]:
        """Path of each text → number of its windows."""
        shares: dict[str, int] = {}
        for source, count in self.recipe.data.shares:
            shares[source.path] = shares.get(source.path, 0) + count
        return shares


@contextmanager
def named(name: str, recipe: Recipe) -> Iterator[None]:
    """Have errors name the key that asks for the windows of a training, see `Draw`."""
    tokens = recipe.end_to_end.tokens
    keys = {f"data.samples={recipe.data.samples}": f"end_to_end.tokens={tokens}", "data.samples": "end_to_end.tokens"}
    with keys_renamed(keys if name == END_TO_END else {}):
        yield


def draws(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: ModelSource, precision: str, folder: Path
) -> list[Draw]:
    """Return what is drawn for the blocks, and, where it is another number, for the end-to-end training.

    Args:
        recipe: the resolved recipe.
        tokenizer: the model's tokenizer.
        source: where the full-precision model comes from.
        precision: the resolved precision of the job.
        folder: folder of the text that the model writes.

    Raises:
        InputError: if a text cannot be read.
    """
    found = []
    for name, each in {BLOCKS: recipe, END_TO_END: recipe.of_end_to_end}.items():
        if each is not None:
            with named(name, each):
                own = self_text(each, tokenizer, source, precision, folder / FILES[name][1], characters_limit(each))
                found.append(Draw(name, each, calibration_texts(each, tokenizer, own), own))
    return found


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


def evaluation_texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[EvaluationText]:
    """Return the texts that perplexity is measured on, whose windows are kept in `folder`."""
    found = []
    for index, (key, section) in enumerate(recipe.evaluation_texts.items()):
        with keys_renamed({"data.evaluation": key, "data.bos": f"{key}.bos"}):
            cache = folder / numbered("evaluation.safetensors", index)
            found.append(read_evaluation_text(text_config(section), tokenizer, cache))
    return found
