"""What a model is and what is wrong with it, found before a run; weights are read one tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.models.architectures import context_length, embedding_rows, find_blocks, is_tied, position_table
from slimplus.models.block_loading import open_model
from slimplus.models.exact import DAMAGED, not_finite
from slimplus.models.loading import ModelSource, build_on_meta
from slimplus.models.source_files import folder_problem, stored_weights
from slimplus.utils.errors import InputError


@dataclass
class SourceReport:
    """What is known of a model.

    Attributes:
        facts: name → value, in words.
        notes: sentences on what is unusual, but stops no run.
        problems: sentences on what no run should begin with.
    """

    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


Check = Callable[[ModelSource, SourceReport], None]
"""Function that adds what it finds in a source to a report, or raises InputError for the one problem that it finds."""


def check_source(source: ModelSource) -> SourceReport:
    """Return what is known of a model, and everything that is found to be wrong with it.

    Each of `CHECKS` is made, although an earlier one found a problem.

    Raises:
        TemporaryFailure: if the disk is full while a model is downloaded.
    """
    report = SourceReport()
    for check in CHECKS:
        try:
            check(source, report)
        except InputError as error:
            if (problem := str(error)) not in report.problems:
                report.problems.append(problem)
    return report


def _files(source: ModelSource, report: SourceReport) -> None:
    """Check the files of a local folder."""
    folder = Path(source.path)
    if folder.is_dir() and (problem := folder_problem(folder, source.gguf_file)):
        raise InputError(problem)


def _architecture(source: ModelSource, report: SourceReport) -> None:
    """Tell the architecture, its blocks and its linear layers, from the configuration alone."""
    model = _skeleton(source)
    blocks = find_blocks(model)
    longest = context_length(model.config)
    table = ", held in a table" if position_table(model) else ""
    report.facts |= {
        "architecture": model.config.model_type,
        "blocks": f"{len(blocks):,}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "embedding": f"{embedding_rows(model):,} rows",
        "positions": "any number" if longest is None else f"{longest:,}{table}",
    }


def _weights(source: ModelSource, report: SourceReport) -> None:
    """Check that the tensors are those of the architecture, and that each is finite."""
    source.check_weights()
    files = [file for file in source.weight_files() if file.suffix == ".safetensors"]
    if files:
        found = not_finite(_stored_tensors(files, report))
    else:  # a GGUF file, or one of PyTorch, which only loading as a whole decodes
        model, load_block = open_model(source)
        if load_block is not None:
            for index in range(len(find_blocks(model))):
                load_block(index)
        report.facts |= {"dtype": str(model.dtype).removeprefix("torch."), "head": _head(is_tied(model))}
        found = None
    if found:
        raise InputError(f"{found}; {DAMAGED}")


def _stored_tensors(files: list[Path], report: SourceReport) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of safetensors files one after the other, and tell their dtypes."""
    stored = stored_weights(files)
    dtypes = Counter(tensor.dtype for tensor in stored.values())
    report.facts["dtype"] = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.items())
    for name, tensor in stored.items():
        yield name, tensor.read(name)


def _tokenizer(source: ModelSource, report: SourceReport) -> None:
    """Tell the tokenizer, and which of its tokens the embedding has no row for."""
    tokenizer = source.tokenizer()
    report.facts["tokenizer"] = f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens"
    rows = embedding_rows(_skeleton(source))
    if beyond := _tokens_beyond(tokenizer, rows):
        name, token = beyond[0]
        report.notes.append(
            f"the tokenizer knows {len(beyond)} tokens that the embedding of {rows} rows has no row for, such as "
            f"{name!r} ({token}); a text that holds one is refused"
        )


def _tokens_beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[tuple[str, int]]:
    """Return the tokens without a row in the embedding, each with its id."""
    return sorted(
        ((name, token) for name, token in tokenizer.get_vocab().items() if token >= rows), key=lambda pair: pair[1]
    )


def _skeleton(source: ModelSource) -> PreTrainedModel:
    """Return the model without weights."""
    return build_on_meta(source.config())


def _head(tied: bool) -> str:
    return "tied to the embedding" if tied else "weights of its own"


def _tying(source: ModelSource, report: SourceReport) -> None:
    """Tell whether embedding and head are tied: by the weights, whatever config.json says."""
    if "head" in report.facts:
        return
    tied, said = source.is_tied(), bool(source.config().tie_word_embeddings)
    report.facts["head"] = _head(tied)
    if said and not tied:
        report.notes.append(
            "config.json says that the head is tied to the embedding (tie_word_embeddings), but the file holds another "
            "head, which counts"
        )


CHECKS: tuple[Check, ...] = (_files, _architecture, _weights, _tying, _tokenizer)
"""The checks, in the order in which their findings are told."""
