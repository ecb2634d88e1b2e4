"""Cheap checks of what a recipe names (model, texts, allocation, folders), before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from slimplus.data.hub import Split
from slimplus.data.text import TextError, check_share, check_source, text_bytes
from slimplus.models.source_files import location_problem
from slimplus.recipe.inputs import ModelSection
from slimplus.recipe.schema import Recipe
from slimplus.recipe.section import RecipeError
from slimplus.recipe.training import EndToEndSection, TrainingSection
from slimplus.utils.requirements import TASKS

RUN_FOLDERS = ("tokens", "blocks", "checkpoints", "logs", "packed")
RUN_FILES = (".lock", "manifest.json", "fingerprint.json", "metrics.json", "recipe.yaml")


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
        "lm_eval": {"evaluation.tasks": bool(recipe.evaluation.tasks)},
        "deepspeed": {"trainer.strategy": recipe.trainer.strategy.startswith("deepspeed")},
        "wandb": {"trainer.logger": "wandb" in recipe.trainer.logger},
        "mlflow": {"trainer.logger": "mlflow" in recipe.trainer.logger},
        "bitsandbytes": {
            "training.optimizer": recipe.quantization.trains and training.optimizer == "adamw_8bit",
            "end_to_end.optimizer": end_to_end.epochs > 0 and end_to_end.optimizer == "adamw_8bit",
            "end_to_end.teacher": end_to_end.epochs > 0
            and end_to_end.learns_from_model
            and end_to_end.teacher != "cached",
        },
    }
    for library, keys in needs.items():
        needed = [key for key, needs in keys.items() if needs]
        if needed and importlib.util.find_spec(library) is None:
            package = TASKS.get(library, library)
            yield f"{' and '.join(needed)}: {library} is not installed; pip install {package}"


def _folder_problem(run_dir: str) -> str | None:
    """Return a sentence if `run_dir`, or the folder to create it in, cannot be written to."""
    folder = Path(run_dir).expanduser()
    existing = next(path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK))
    if not existing.is_dir():
        return f"run_dir: {existing} is a file; give a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"run_dir: {existing} cannot be written to; give another folder"
    for name in RUN_FOLDERS:
        if (path := folder / name).exists() and not (path.is_dir() and os.access(path, os.R_OK | os.W_OK | os.X_OK)):
            return (
                f"run_dir: {path} is no folder that can be written to; change its permissions, or give another run_dir"
            )
    for name in RUN_FILES:
        if (path := folder / name).exists() and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
            return f"run_dir: {path} is no file that can be written to; change its permissions, or give another run_dir"
    return None


def check_shares(recipe: Recipe, processes: int) -> None:
    """Check that the windows, and the windows of each training step, can be shared evenly by the processes of a job.

    Raises:
        RecipeError: if they cannot; the message names the key and what it must be a multiple of.
    """
    samples = recipe.data.samples
    if recipe.evaluation.tasks and processes > 1:
        raise RecipeError(
            f"evaluation.tasks: one process asks them, and this job has {processes}; leave them out, and run `slimplus "
            "evaluate RUN_DIR/packed --against MODEL --tasks …` afterwards"
        )
    if samples % processes:
        raise RecipeError(
            f"data.samples: {samples} windows cannot be shared evenly by {processes} processes; "
            f"give a multiple of {processes}"
        )
    if recipe.quantization.trains:
        _check_step("training", recipe.training, samples, processes)
    if recipe.end_to_end.epochs:
        _check_step("end_to_end", recipe.end_to_end, recipe.end_to_end_windows, processes)
    for key, text in recipe.evaluation_texts.items():
        if text.windows < processes:
            raise RecipeError(
                f"{key}.windows: {text.windows} is less than one for each of {processes} processes; "
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


def _calibration_problems(recipe: Recipe, asked: str) -> Iterator[str | None]:
    """Yield a sentence for each calibration text that cannot give its share of the windows, which `asked` asks for."""
    data = recipe.data
    for source, share in data.shares:
        try:
            check_share(source.path, share, asked)
        except TextError as error:
            yield str(error)
        part = "" if len(data.shares) == 1 else f"its share of {share} of "
        need = f"{part}{asked} of data.sequence_length={data.sequence_length}"
        yield _text_problem(source.path, "calibration", share * data.sequence_length, need)


def check_model(model: ModelSection) -> None:
    """Check that a model is where its section of the recipe says, without loading it.

    Raises:
        RecipeError: if the model is not there, or is not readable.
    """
    problem = location_problem(model.path, model.gguf_file, model.revision)
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
        model = recipe.model
        problems.append(location_problem(model.path, model.gguf_file, model.revision, weights=not recipe.dry_run))
    if not recipe.dry_run:
        problems += [*_library_problems(recipe), _folder_problem(recipe.run_dir)]
        problems += _calibration_problems(recipe, f"data.samples={data.samples} windows")
        if (larger := recipe.of_end_to_end) is not None:
            problems += _calibration_problems(larger, f"end_to_end.tokens={recipe.end_to_end.tokens} in windows")
        if (prompts := data.generation.prompts) is not None:
            problem = _text_problem(prompts, "calibration", data.generation.prefix_tokens or 1, "one prompt")
            problems.append(problem and problem.replace("data.calibration.path", "data.generation.prompts"))
        for key, text in recipe.evaluation_texts.items():
            tokens = text.sequence_length
            need = f"one window of {key}.sequence_length={tokens}"
            problem = _text_problem(text.path, "evaluation", tokens, need)
            problems.append(problem and problem.replace("data.evaluation.path", f"{key}.path"))
    if allocation and recipe.quantization.allocates_by == "file" and not Path(allocation).expanduser().is_file():
        problems.append(
            f"quantization.allocation: {allocation} is no file; give slimllm, uniform, block or model, the "
            "allocation.json of a run, or a published group-precision .pt file"
        )
    if any(problems):
        raise RecipeError("\n".join(filter(None, problems)))
