"""Cheap checks of what a recipe names (model, texts, allocation), before anything heavy is imported."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from slimplus.config import ModelConfig, Recipe, RecipeError, resolve_model_folder

HUB_TEXTS = ("wikitext2", "c4", "ptb")
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def _model_problem(model: ModelConfig) -> str | None:
    try:
        folder = Path(resolve_model_folder(model.path))
    except RecipeError as error:
        return str(error)
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model.path):
            return None  # a hub id: the hub knows
        return f"model.path: {model.path} does not exist; give a folder, a hub id org/name or package:NAME"
    if folder.is_file():
        return f"model.path: {folder} is a file; give its folder, and a GGUF file's name as model.gguf_file"
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if model.gguf_file and not (folder / model.gguf_file).is_file():
        held = f"its GGUF files are {', '.join(ggufs)}" if ggufs else "it holds no GGUF file"
        return f"model.gguf_file: {model.gguf_file} is not in {folder}; {held}"
    if not model.gguf_file and not (folder / "config.json").is_file():
        remedy = f"give model.gguf_file={ggufs[0]}" if ggufs else "give a folder that save_pretrained wrote"
        return f"model.path: {folder} has no config.json; {remedy}"
    return None


def _text_problem(key: str, path: str, tokens: int, need: str) -> str | None:
    """Checks one text that must give `tokens` tokens, which `need` explains; a token is at least one byte."""
    file = Path(path).expanduser()
    if path in HUB_TEXTS:
        return None  # the hub knows
    if path == "offline":
        from pydoc_data.topics import topics

        size = sum(len(topic.encode()) for topic in topics.values())
    elif file.suffix in TEXT_SUFFIXES and file.is_file():
        size = file.stat().st_size
        with file.open("rb") as lines:
            if not any(line.strip() for line in lines):
                return f"{key}: {path} holds no text; give a file with some"
    else:
        sources = ("offline", *HUB_TEXTS)
        close = difflib.get_close_matches(path, sources, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        files = ", ".join(TEXT_SUFFIXES)
        return f"{key}: {path} is not one of {', '.join(sources)}, nor an existing {files} file{guess}"
    if size < tokens and file.suffix != ".parquet":  # compressed: its size is no bound on its text
        short = f"{key}: {path} has {size:,} bytes, too few for {need} ({tokens:,} tokens)"
        return f"{short}; give a longer text or ask for less of it"
    return None


def check_inputs(recipe: Recipe) -> None:
    """Looks for the model, the texts and the allocation that the recipe names, without loading them.

    Raises:
        RecipeError: everything that is wrong, a sentence a line.
    """
    problems: list[str | None] = []
    data, allocation = recipe.data, recipe.quantization.allocation
    if not (recipe.dry_run and recipe.model.config):
        problems.append(_model_problem(recipe.model))
    if not recipe.dry_run:
        tokens = data.samples * data.sequence_length
        need = f"data.samples={data.samples} windows of data.sequence_length={data.sequence_length}"
        problems.append(_text_problem("data.calibration.path", data.calibration.path, tokens, need))
        tokens = data.evaluation.sequence_length
        need = f"one window of data.evaluation.sequence_length={tokens}"
        problems.append(_text_problem("data.evaluation.path", data.evaluation.path, tokens, need))
    if allocation and not Path(allocation).expanduser().is_file():
        problems.append(f"quantization.allocation: {allocation} is not a file; give the allocation.json of a run")
    if any(problems):
        raise RecipeError("\n".join(filter(None, problems)))
