"""Cheap checks of what a recipe names (model, texts, allocation, folders), before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from slimplus.data.hub import Split
from slimplus.data.text import TextError, check_source, share_samples, text_bytes
from slimplus.models.location import resolve_model_folder
from slimplus.recipe.inputs import ModelSection
from slimplus.recipe.schema import EndToEndSection, Recipe, TrainingSection
from slimplus.recipe.section import RecipeError
from slimplus.utils.errors import InputError, named_first_line


def _model_problem(model: ModelSection) -> str | None:
    """Return a sentence if the model is not where the recipe says."""
    try:
        folder = Path(resolve_model_folder(model.path))
    except InputError as error:
        return str(error)
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model.path):
            return _hub_problem(model.path, model.revision)
        return f"model.path: {model.path} does not exist; give a folder, a hub id org/name or package:NAME"
    if folder.is_file():
        return f"model.path: {folder} is a file; give its folder, and a GGUF file's name as model.gguf_file"
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if model.gguf_file and not (folder / model.gguf_file).is_file():
        found = f"its GGUF files are {', '.join(ggufs)}" if ggufs else "it holds no GGUF file"
        return f"model.gguf_file: {model.gguf_file} is not in {folder}; {found}"
    if not model.gguf_file and not (folder / "config.json").is_file():
        remedy = f"give model.gguf_file={ggufs[0]}" if ggufs else "give a folder that save_pretrained wrote"
        return f"model.path: {folder} has no config.json; {remedy}"
    if unreadable := [file for file in sorted(folder.iterdir()) if not os.access(file, os.R_OK)]:
        return f"model.path: {unreadable[0]} cannot be read; change its permissions"
    return None


def _hub_problem(repository: str, revision: str | None) -> str | None:
    """Return a sentence if neither the local cache nor the hub has the model; the request takes a second."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        if isinstance(try_to_load_from_cache(repository, "config.json", revision=revision), str):
            return None
        HfApi().model_info(repository, revision=revision, timeout=10)
    except (OSError, HTTPError, HFValidationError) as error:
        reason = named_first_line(error)
        return (
            f"model.path: {repository} is no local folder and cannot be had from the hub ({reason}); "
            "check the id, the network and your login, or download the model and give its folder"
        )
    return None


def _text_problem(path: str, split: Split, tokens: int, need: str) -> str | None:
    """Return a sentence if a text does not exist or is too short.

    A token takes at least one byte, so a text of fewer bytes than tokens is too short.

    Args:
        path: the text, as `data.*.path` names it.
        split: `calibration` or `evaluation`.
        tokens: number of tokens that the text must give.
        need: what the tokens are needed for, in words.
    """
    try:
        check_source(path, split)
    except TextError as error:
        return str(error)
    size = text_bytes(path)
    if size is None or size >= tokens:
        return None
    short = f"data.{split}.path: {path} has {size:,} bytes, too few for {need} ({tokens:,} tokens)"
    return f"{short}; give a longer text or ask for less of it"


def _library_problems(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each library that this recipe needs and that is not installed."""
    training, end_to_end = recipe.training, recipe.end_to_end
    gguf = {"model.gguf_file": recipe.model.gguf_file is not None}
    needs: dict[str, dict[str, bool]] = {
        "accelerate": gguf,
        "gguf": gguf,
        "deepspeed": {"trainer.strategy": recipe.trainer.strategy.startswith("deepspeed")},
        "bitsandbytes": {
            "training.optimizer": recipe.quantization.trains and training.optimizer == "adamw_8bit",
            "end_to_end.optimizer": end_to_end.epochs > 0 and end_to_end.optimizer == "adamw_8bit",
            "end_to_end.teacher": end_to_end.epochs > 0
            and end_to_end.teacher != "cached"
            and max(end_to_end.distillation, end_to_end.hidden_states) > 0,
        },
    }
    for library, keys in needs.items():
        needed = [key for key, needs in keys.items() if needs]
        if needed and importlib.util.find_spec(library) is None:
            yield f"{' and '.join(needed)}: {library} is not installed; pip install {library}"


def _folder_problem(run_dir: str) -> str | None:
    """Return a sentence if `run_dir`, or the folder to create it in, cannot be written to."""
    folder = Path(run_dir).expanduser()
    existing = next(path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK))
    if not existing.is_dir():
        return f"run_dir: {existing} is a file; give a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"run_dir: {existing} cannot be written to; give another folder"
    return None


def check_shares(recipe: Recipe, processes: int) -> None:
    """Check that the windows, and the windows of each training step, can be shared evenly by the processes of a job.

    Raises:
        RecipeError: if they cannot; the message names the key and what it must be a multiple of.
    """
    samples, windows = recipe.data.samples, recipe.data.evaluation.windows
    if samples % processes:
        raise RecipeError(
            f"data.samples: {samples} windows cannot be shared evenly by {processes} processes; "
            f"give a multiple of {processes}"
        )
    if recipe.quantization.trains:
        _check_step("training", recipe.training, samples, processes)
    if recipe.end_to_end.epochs:
        _check_step("end_to_end", recipe.end_to_end, samples, processes)
    if windows < processes:
        raise RecipeError(
            f"data.evaluation.windows: {windows} is less than one for each of {processes} processes; "
            f"give at least {processes}"
        )


def _check_step(section: str, training: TrainingSection | EndToEndSection, samples: int, processes: int) -> None:
    """Check that the windows can be cut into steps, and each step into equal parts for each process."""
    step, parts = training.batch_size, training.accumulate_grad_batches
    if step % (processes * parts):
        raise RecipeError(
            f"{section}.batch_size: {step} windows a step cannot be shared evenly by {processes} processes in "
            f"{parts} parts each ({section}.accumulate_grad_batches); give a multiple of {processes * parts}"
        )
    if samples % step:
        raise RecipeError(
            f"data.samples: {samples} windows are no whole number of steps of {step} ({section}.batch_size); "
            f"give a multiple of {step}"
        )


def check_model(model: ModelSection) -> None:
    """Check that a model is where its section of the recipe says, without loading it.

    Raises:
        RecipeError: if the model is not there, or is not readable.
    """
    problem = _model_problem(model)
    if problem:
        raise RecipeError(problem)


def check_inputs(recipe: Recipe) -> None:
    """Check that the model, the texts, the allocation and the libraries of a recipe are there, without loading them.

    Raises:
        RecipeError: if anything is missing; the message has a line for each problem.
    """
    if not recipe.dry_run:
        check_shares(recipe, recipe.trainer.devices * recipe.trainer.num_nodes)
    problems: list[str | None] = []
    data, allocation = recipe.data, recipe.quantization.allocation
    if not (recipe.dry_run and recipe.model.config):
        problems.append(_model_problem(recipe.model))
    if not recipe.dry_run:
        problems += [*_library_problems(recipe), _folder_problem(recipe.run_dir)]
        sources = data.calibration.sources
        shares = share_samples(data.samples, [source.weight for source in sources])
        for source, share in zip(sources, shares, strict=True):
            part = "" if len(sources) == 1 else f"its share of {share} of "
            need = f"{part}data.samples={data.samples} windows of data.sequence_length={data.sequence_length}"
            problems.append(_text_problem(source.path, "calibration", share * data.sequence_length, need))
        tokens = data.evaluation.sequence_length
        need = f"one window of data.evaluation.sequence_length={tokens}"
        problems.append(_text_problem(data.evaluation.path, "evaluation", tokens, need))
    if allocation and recipe.quantization.allocates_by == "file" and not Path(allocation).expanduser().is_file():
        problems.append(
            f"quantization.allocation: {allocation} is no file; give slimllm, uniform, block or model, the "
            "allocation.json of a run, or a published group-precision .pt file"
        )
    if any(problems):
        raise RecipeError("\n".join(filter(None, problems)))
