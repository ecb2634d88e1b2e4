"""Evaluation of any checkpoint that transformers loads, packed or not, alone or against the model it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from slimplus.data.text import characters_to_read, read_text
from slimplus.data.windows import chat_renderer, evaluation_windows
from slimplus.evaluation.divergence import Comparison, Recorder, statistics
from slimplus.evaluation.generation import find_device
from slimplus.evaluation.perplexity import perplexity_of_logits
from slimplus.models.auto_class import auto_class
from slimplus.models.exact import key_problem
from slimplus.models.loading import UNBUILDABLE, ModelSource
from slimplus.models.location import resolve_model_folder
from slimplus.utils.errors import InputError, first_line


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and where.

    Attributes:
        texts: names or paths of the texts.
        windows: windows of each text at most, from its start.
        sequence_length: tokens in a window.
        device: where the models run.
        dtype: dtype of what is not quantized, and of the arithmetic; `auto` is the stored one.
    """

    texts: Sequence[str]
    windows: int
    sequence_length: int
    device: str
    dtype: str


def evaluate(path: str, against: str | None, config: EvaluationConfig) -> list[dict[str, Any]]:
    """Return the figures of a checkpoint on each text: perplexity, and divergence from the model it is held against.

    One model after the other is in memory.

    Args:
        path: folder, hub id, `package:NAME` or GGUF file of the checkpoint.
        against: the same of the model that it was made from, or None.
        config: what is measured, and where.

    Raises:
        InputError: if a model, a tokenizer or a text cannot be read, the two models' tokenizers give
            different tokens, or there is no such device.
    """
    device = find_device(config.device)
    checkpoint = _source(path)
    windows = _windows(checkpoint, config)
    if against is not None and not _equal(_windows(_source(against), config), windows):
        raise InputError(
            f"--against: {against} makes other tokens of a text than {path}; give the model it was made from"
        )
    recorders = {text: Recorder() for text in windows}
    full: dict[str, float] = {}
    if against is not None:
        model = _load(_source(against), device, config.dtype)
        full = {text: _perplexity(model, tokens, recorders[text]) for text, tokens in windows.items()}
        del model
    model = _load(checkpoint, device, config.dtype)
    rows = []
    for text, tokens in windows.items():
        row = {"text": text, "windows": len(tokens), "sequence_length": tokens.shape[1]}
        if against is None:
            rows.append(row | {"perplexity": {"checkpoint": _perplexity(model, tokens, None)}})
            continue
        comparison = Comparison(recorders[text].predictions())
        found = {"checkpoint": _perplexity(model, tokens, comparison), "against": full[text]}
        figures = statistics(torch.cat(comparison.divergences), torch.cat(comparison.agreements))
        rows.append(row | {"perplexity": found, "divergence": figures})
    return rows


def _source(path: str) -> ModelSource:
    """Return where a model comes from; a path to a GGUF file names the folder, the package or the hub id before it."""
    folder, _, file = path.rpartition("/")
    is_gguf = file.endswith(".gguf")
    return ModelSource(resolve_model_folder(folder or "." if is_gguf else path), file if is_gguf else None)


def _windows(source: ModelSource, config: EvaluationConfig) -> dict[str, Tensor]:
    """Return the windows of each text, `[windows, sequence_length]`."""
    tokenizer = source.tokenizer()
    limit = characters_to_read(config.windows * config.sequence_length)
    found = {}
    for text in config.texts:
        whole = read_text(text, "evaluation", limit=limit, render_chat=chat_renderer(tokenizer)).joined
        found[text] = evaluation_windows(whole, tokenizer, config.windows, config.sequence_length).tokens
    return found


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Return whether the windows of all texts are the same."""
    return all(torch.equal(tokens, others[text]) for text, tokens in some.items())


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


def _perplexity(model: PreTrainedModel, tokens: Tensor, observer: Recorder | Comparison | None) -> float:
    """Return the perplexity of a model on windows, which the observer sees as well.

    Raises:
        InputError: if the perplexity is NaN or infinite.
    """
    observe = None if observer is None else observer.add
    measured = perplexity_of_logits(_logits(model, tokens), tokens, model.device, observe)
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


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures as text: a line for each text, the numbers under their names."""
    names = {"kl_mean": "mean KL", "kl_median": "median", "kl_p99": "99%", "kl_max": "maximum"}
    compared = ["against", *names.values(), "same top token"] if "divergence" in rows[0] else []
    lines = [["text", "windows", "perplexity", *compared]]
    for row in rows:
        cells = [row["text"], f"{row['windows']} x {row['sequence_length']}"]
        cells += [f"{value:.3f}" for value in row["perplexity"].values()]
        if "divergence" in row:
            cells += [f"{row['divergence'][key]:.4g}" for key in names]
            cells.append(f"{row['divergence']['top_token_agreement']:.2%}")
        lines.append(cells)
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{name:<{sizes[0]}}  " + "  ".join(f"{cell:>{size}}" for cell, size in zip(cells, sizes[1:], strict=True))
        for name, *cells in lines
    )
