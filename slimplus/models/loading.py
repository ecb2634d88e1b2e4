"""Loading of models, configurations and tokenizers from the hub, a folder, or a folder with a GGUF file."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from slimplus.models.architectures import is_tied, plain_linears, set_tied
from slimplus.models.auto_class import auto_class
from slimplus.models.exact import finite_problem, key_problem
from slimplus.models.source_files import CONFIG, PROCESSOR, SourceFileError, code_problem, stored_weights, weight_files
from slimplus.utils.errors import InputError, TemporaryFailure, first_line, is_full, named_first_line

UNREADABLE = (OSError, ValueError, SafetensorError, StrictDataclassError)  # what transformers raises for bad files
# What transformers and PyTorch raise for values of config.json that no model can be built from.
UNBUILDABLE = (
    *(*UNREADABLE, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(RuntimeError, TypeError, struct.error),  # the last one for GGUF files cut short
)


class ModelLoadError(InputError):
    """Error of a model, a configuration or a tokenizer that cannot be loaded."""


@dataclass(frozen=True)
class ModelSource:
    """The place that a model is loaded from, and how it is loaded.

    Attributes:
        path: hub id or local folder.
        gguf_file: name of the GGUF file in `path` that holds the weights, if one does.
        dtype: `auto` (as stored; bfloat16 for a GGUF file), or the name of a torch dtype.
        trust_remote_code: whether to run code that ships with the model.
        revision: branch, tag or commit of a hub id; None for `main`.
    """

    path: str
    gguf_file: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None

    def pinned(self) -> ModelSource:
        """Return this source with its revision set to the commit that the hub holds at the moment.

        A job reads the files more than once, for days, and all of them must come from one commit. A local folder is
        returned unchanged.

        Raises:
            ModelLoadError: if the hub does not give the model's files.
            TemporaryFailure: if the disk is full.
        """
        if Path(self.path).is_dir():
            return self
        name = self.gguf_file or "config.json"
        try:
            file = hf_hub_download(self.path, name, revision=self.revision)
        except (*UNREADABLE, HTTPError, RuntimeError) as error:
            raise self.explain(error) from error
        return replace(self, revision=Path(file).parents[len(Path(name).parts) - 1].name)  # …/snapshots/COMMIT/NAME

    def _arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that every `from_pretrained` of this source takes."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "revision": self.revision or "main"}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    def explain(self, error: Exception, part: str = "config.json") -> ModelLoadError | TemporaryFailure:
        """Return the error to raise in the place of one that the hub client or transformers raised.

        Args:
            error: the error.
            part: the files of a local folder that are most likely to be wrong.
        """
        if is_full(error):
            return TemporaryFailure(
                f"model.path: no space is left to download {self.path}; free some, or set HF_HOME to another disk"
            )
        if Path(self.path).is_dir():
            file = self.gguf_file or part
            return ModelLoadError(
                f"model.path: cannot load {self.path} ({named_first_line(error)}); check {file}, or download the model "
                "again"
            )
        return ModelLoadError(
            f"model.path: cannot load '{self.path}' ({first_line(error)}); check the hub id and your login, "
            "or download the model and give its local folder"
        )

    def config(self) -> PretrainedConfig:
        """Return the model's configuration.

        Raises:
            ModelLoadError: if the configuration cannot be loaded, or belongs to a quantized model.
            TemporaryFailure: if the disk is full.
        """
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.path, **self._arguments())
        except UNBUILDABLE as error:
            raise self.explain(error) from error
        if (quantized := getattr(config, "quantization_config", None)) is not None:
            values = quantized if isinstance(quantized, Mapping) else quantized.to_dict()
            raise ModelLoadError(
                f"model.path: '{self.path}' is quantized already ({values.get('quant_method')}); give the "
                "full-precision model instead"
            )
        return config

    @staticmethod
    def config_of(values: Mapping[str, Any]) -> PretrainedConfig:
        """Build a configuration from values, and from the defaults of their architecture for all others.

        Args:
            values: `model_type` and any other fields of the configuration.

        Raises:
            ModelLoadError: for an unknown architecture, or values that the architecture does not take.
        """
        others = dict(values)
        model_type = others.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ModelLoadError(f"model.config: {model_type!r} is no model_type of transformers")
        try:
            return AutoConfig.for_model(model_type, **others)
        except (ValueError, StrictDataclassError) as error:
            raise ModelLoadError(f"model.config: no {model_type} has such values ({first_line(error)})") from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer.

        Raises:
            ModelLoadError: if the tokenizer cannot be loaded.
            TemporaryFailure: if the disk is full.
        """
        try:
            tokenizer = read_tokenizer(self.path, **self._arguments())
            tokenizer("a")  # values of tokenizer_config.json are read with the first text
            return tokenizer
        except UNBUILDABLE as error:
            raise self.explain(error, "tokenizer.json and tokenizer_config.json") from error

    @property
    def loaded_dtype(self) -> str:
        """Name of the dtype to load, or `auto`."""
        # A GGUF file stores blocks of integers, not a dtype; bfloat16 is what dequantized weights are served in.
        return "bfloat16" if self.dtype == "auto" and self.gguf_file else self.dtype

    def whole_bytes(self, skeleton: PreTrainedModel) -> int:
        """Return the bytes of the weights that `model` loads.

        Args:
            skeleton: the model, which may lie on the meta device.
        """
        dtype = skeleton.dtype if self.loaded_dtype == "auto" else getattr(torch, self.loaded_dtype)
        return int(skeleton.num_parameters() * dtype.itemsize)

    def load(self, **arguments: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Return the model, and what transformers tells of the loading."""
        arguments |= self._arguments()
        if self.gguf_file and hasattr(transformers, "GgufConfig"):  # newer versions keep the integers by default
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return self.load_as(auto_class(self.config().to_dict()), self.path, **arguments)

    def load_as(self, kind: Any, path: str | None, **arguments: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Return a model of a class of transformers, and what transformers tells of the loading."""
        fixed: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are refused
        try:
            with _quiet(progress="device_map" not in arguments or not Path(self.path).is_dir()):
                loaded: Any = kind.from_pretrained(path, dtype=self.loaded_dtype, **arguments, **fixed)
        except UNBUILDABLE as error:
            raise self.explain(error) from error
        return loaded

    def check_weights(self) -> None:
        """Check that the files hold exactly the tensors of the architecture; none of them is read.

        A GGUF file is left to `model`, since transformers decodes all of it to tell its tensors.

        Raises:
            ModelLoadError: naming the tensor that is missing, has another shape or has no place, or the file that is
                damaged.
            TemporaryFailure: if the disk is full.
        """
        if not self.gguf_file:
            _, info = self.load(device_map={"": "meta"})
            self.check(info)

    def check(self, info: Mapping[str, Any]) -> None:
        """Raise ModelLoadError if the tensors that were loaded are not those of the architecture."""
        try:
            problem = key_problem(info) or code_problem(stored_weights(self.weight_files()))
        except SourceFileError as error:
            problem = str(error)
        if problem:
            raise ModelLoadError(f"model.path: {self.path}: {problem}")

    def weight_files(self) -> list[Path]:
        """Return the files that the weights are read from; those of a hub id once they have been downloaded.

        Raises:
            SourceFileError: if a local folder holds no weights, or their index is damaged.
        """
        if Path(self.path).is_dir():
            return weight_files(Path(self.path), self.gguf_file)
        cached = try_to_load_from_cache(self.path, self.gguf_file or CONFIG, revision=self.revision)
        return weight_files(Path(cached).parent, None) if isinstance(cached, str) and not self.gguf_file else []

    def processor_files(self) -> list[Path]:
        """Return the files that tell how images become tensors; those of a hub id are downloaded.

        Raises:
            ModelLoadError: if the hub does not answer.
            TemporaryFailure: if the disk is full.
        """
        missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "revision": self.revision}
        try:
            found = [cached_file(self.path, name, **missing) for name in PROCESSOR]
        except UNREADABLE as error:
            raise self.explain(error) from error
        return [Path(file) for file in found if file is not None]

    def is_tied(self) -> bool:
        """Return whether embedding and head are one weight; where a file holds both, they are compared.

        Raises:
            ModelLoadError: if the model cannot be loaded.
        """
        if self.gguf_file:  # whose configuration is made from the file: the two are tied where it holds no head
            return bool(self.config().tie_word_embeddings)
        model, _ = self.load(device_map={"": "meta"})
        if not self.config().tie_word_embeddings or is_tied(model):
            return is_tied(model)
        stored = stored_weights(self.weight_files())
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names = [f"{name}.weight" for name, module in model.named_modules() if module in ends]
        if not all(name in stored for name in names):
            return is_tied(self.model())
        embedding, head = (stored[name].read(name) for name in names)
        return torch.equal(embedding, head)

    def model(self) -> PreTrainedModel:
        """Load the model on the CPU, in its stored dtype (or `dtype`), in evaluation mode, frozen.

        `tie_word_embeddings` of its configuration says whether the weights that were loaded are tied, which the file
        may contradict.

        Raises:
            ModelLoadError: if the model cannot be loaded exactly, or holds NaN or infinity.
            TemporaryFailure: if the disk is full.
        """
        model, info = self.load()
        self.check(info)
        return self.finished(model, ModelSource.model)

    def finished(self, model: PreTrainedModel, load: Callable[[ModelSource], object]) -> PreTrainedModel:
        """Return a model that was loaded, whole or in part, in evaluation mode and frozen.

        Args:
            model: the model.
            load: function that has loaded it.

        Raises:
            ModelLoadError: if it holds NaN or infinity.
        """
        if problem := finite_problem(model):
            if self.dtype != "auto":
                load(replace(self, dtype="auto"))  # which says if the file itself holds it
                raise ModelLoadError(f"model.dtype: {self.path}: {problem.split(';')[0]} as {self.dtype}; give auto")
            raise ModelLoadError(f"model.path: {self.path}: {problem}")
        set_tied(model.config, is_tied(model))
        return plain_linears(model.eval().requires_grad_(False))


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep transformers from reporting on tensors, which `key_problem` does, and from a bar if nothing is read."""
    log, shown = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()

    def drop(_: logging.LogRecord) -> bool:
        return False

    log.addFilter(drop)
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.removeFilter(drop)
        if shown:
            transformers_logging.enable_progress_bar()


class _NoBareException(AbstractContextManager[None]):
    """Context that makes a ValueError of a bare Exception, which the library tokenizers raises for damaged files."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception:
            raise ValueError(f"tokenizer.json is damaged: {error}") from error


def read_tokenizer(path: str | Path, **arguments: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model or of a packed checkpoint.

    Args:
        path: folder or hub id.
        **arguments: arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: if tokenizer.json is damaged; other errors of `UNBUILDABLE` come from other damage.
    """
    file = Path(path, "tokenizer.json")
    if file.is_file():
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:  # transformers says this without the file's name
            raise ValueError(f"{file.name} is damaged: {error}") from error
    with _NoBareException():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **arguments)
        return tokenizer


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device: its weights have shapes and take no memory.

    Raises:
        ModelLoadError: if no causal language model can be built from the configuration.
        UnsupportedModelError: if the model has no list of blocks.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config.to_dict()).from_config(config)
    except UNBUILDABLE as error:
        raise ModelLoadError(
            f"model.path: no causal language model can be built from the configuration of this {config.model_type} "
            f"({named_first_line(error)}); correct its config.json"
        ) from error
    with torch.device("meta"):
        return plain_linears(model)
