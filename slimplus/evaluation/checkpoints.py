"""Evaluation of any checkpoint that transformers loads, packed or not, alone or against the model it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from slimplus.data.windows import check_ids
from slimplus.evaluation.divergence import Comparison, Recorder
from slimplus.evaluation.generation import find_device
from slimplus.evaluation.perplexity import perplexity_of_logits
from slimplus.evaluation.tasks import TaskConfig, load_tasks, score, settings
from slimplus.evaluation.texts import EvaluationText, TextConfig, read_evaluation_text
from slimplus.models.architectures import embedding_rows, too_long
from slimplus.models.auto_class import auto_class
from slimplus.models.exact import key_problem
from slimplus.models.loading import UNBUILDABLE, ModelSource
from slimplus.models.location import resolve_model_folder
from slimplus.utils.errors import InputError, first_line


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and where.

    Attributes:
        texts: the texts; there may be none.
        tasks: tasks of lm-eval, or None.
        device: where the models run.
        dtype: dtype of what is not quantized, and of the arithmetic; `auto` is the stored one.
    """

    texts: Sequence[TextConfig]
    tasks: TaskConfig | None
    device: str
    dtype: str


def evaluate(path: str, against: str | None, config: EvaluationConfig) -> dict[str, Any]:
    """Return the figures of a checkpoint, and of the model it is held against, one after the other in memory.

    Args:
        path: folder, hub id, `package:NAME` or GGUF file of the checkpoint.
        against: the same of the model that it was made from, or None.
        config: what is measured, and where.

    Returns:
        `models`: path and dtype of each; `texts`: perplexity and divergence on each text, as `texts` in metrics.json;
        `tasks`: how tasks are asked, and the scores of each model, if there are any.

    Raises:
        InputError: if a model, a tokenizer, a text or a task cannot be read, the two models' tokenizers give
            different tokens, or there is no such device.
    """
    device = find_device(config.device)
    sources = {"checkpoint": _source(path)} | ({} if against is None else {"against": _source(against)})
    for source in sources.values():
        _check_source(source, config.texts)
    texts = _texts(sources["checkpoint"], config)
    if against is not None and not _equal(_texts(sources["against"], config), texts):
        raise InputError(
            f"--against: {against} makes other tokens of a text than {path}; give the model it was made from"
        )
    tasks = None if config.tasks is None else load_tasks(config.tasks)
    rows: list[dict[str, Any]] = [text.protocol | {"perplexity": {}} for text in texts]
    recorders = [Recorder() for _ in texts]
    scores, models = {}, {}
    for name, source in reversed(sources.items()):
        model = _load(source, device, config.dtype)
        models[name] = {"path": {"checkpoint": path, "against": against}[name], "dtype": str(model.dtype).split(".")[1]}
        tokenizer = source.tokenizer()
        for text in texts:
            check_ids(text.tokens, embedding_rows(model), tokenizer, "data.evaluation.path")
        for text, row, recorder in zip(texts, rows, recorders, strict=True):
            if name == "against":
                row["perplexity"][name] = _perplexity(model, text, recorder)
            else:
                row |= _compared(model, text, row["perplexity"], recorder if against else None)
        if tasks is not None:
            scores[name] = score(model, tokenizer, tasks)
        del model
    return {"models": models, "texts": rows} | (
        {} if tasks is None else {"tasks": {"settings": settings(tasks), "scores": scores}}
    )


def _compared(
    model: PreTrainedModel, text: EvaluationText, perplexity: dict[str, float], recorder: Recorder | None
) -> dict[str, Any]:
    """Return the figures of the checkpoint on a text: perplexity beside the other model's, and divergence from it."""
    if recorder is None:
        return {"perplexity": {"checkpoint": _perplexity(model, text, None)}}
    comparison = Comparison(recorder.predictions())
    measured = perplexity | {"checkpoint": _perplexity(model, text, comparison)}
    found = text.divergence(torch.cat(comparison.divergences), torch.cat(comparison.agreements))
    return {"perplexity": measured, "divergence": found}


def _source(path: str) -> ModelSource:
    """Return where a model comes from; a path to a GGUF file names the folder, the package or the hub id before it."""
    folder, _, file = path.rpartition("/")
    is_gguf = file.endswith(".gguf")
    return ModelSource(resolve_model_folder(folder or "." if is_gguf else path), file if is_gguf else None)


def _check_source(source: ModelSource, texts: Sequence[TextConfig]) -> None:
    """Check that a model takes windows as long as those of the texts.

    Raises:
        InputError: if it does not, its configuration cannot be read, or a run directory is in its place.
    """
    folder = Path(source.path)
    if not (folder / "config.json").is_file() and (folder / "packed" / "config.json").is_file():
        raise InputError(f"{folder} is a run directory; give {folder / 'packed'}")
    try:
        config = source.config() if source.gguf_file else AutoConfig.from_pretrained(source.path)
    except UNBUILDABLE as error:
        raise source.explain(error) from error
    for text in texts:
        if problem := too_long(config, "data.evaluation.sequence_length", text.sequence_length):
            raise InputError(problem)


def _texts(source: ModelSource, config: EvaluationConfig) -> list[EvaluationText]:
    """Return the texts as the tokenizer of a model cuts them."""
    tokenizer = source.tokenizer()
    return [read_evaluation_text(text, tokenizer) for text in config.texts]


def _equal(some: Sequence[EvaluationText], others: Sequence[EvaluationText]) -> bool:
    """Return whether the windows of all texts are the same."""
    return all(torch.equal(text.tokens, other.tokens) for text, other in zip(some, others, strict=True))


def _load(source: ModelSource, device: torch.device, dtype: str) -> PreTrainedModel:
    """Load a checkpoint of any method that transformers knows, exactly; only safetensors and GGUF files are read.

    Raises:
        InputError: if it cannot be loaded, or its tensors are not those of its architecture.
    """
    if source.gguf_file:  # as a run reads the model that it quantizes
        full: Any = replace(source, dtype=dtype).model()
        return cast(PreTrainedModel, full.to(device))
    try:
        config, _ = PretrainedConfig.get_config_dict(source.path)
        loaded: Any = auto_class(config).from_pretrained(
            source.path,
            dtype=dtype,
            device_map=str(device),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise InputError(f"{source.path} needs a library that is not installed: {first_line(error)}") from error
    except UNBUILDABLE as error:
        raise InputError(
            f"{source.path} cannot be loaded ({first_line(error)}); give the folder or the hub id of a model"
        ) from error
    model, info = loaded
    if problem := key_problem(info):
        raise InputError(f"{source.path}: {problem}")
    return cast(PreTrainedModel, model.eval())


def _perplexity(model: PreTrainedModel, text: EvaluationText, observer: Recorder | Comparison | None) -> float:
    """Return the perplexity of a model on a text, which the observer sees as well.

    Raises:
        InputError: if the perplexity is NaN or infinite.
    """
    observe = None if observer is None else observer.add
    logits = _logits(model, text.tokens)
    measured = perplexity_of_logits(logits, text.tokens, model.device, observe, text.counted)
    if not math.isfinite(measured):
        raise InputError(
            f"the perplexity of {model.name_or_path} is {measured}: its activations overflowed in "
            f"{model.dtype}; give --dtype float32, or download the model again"
        )
    return measured


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the logits of one window after the other, `[1, sequence_length, vocabulary]`."""
    for window in tqdm(tokens.split(1), "windows", leave=False, disable=None):
        yield model(input_ids=window.to(model.device), use_cache=False).logits
