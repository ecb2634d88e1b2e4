"""Loading of models, configurations and tokenizers from the hub, a folder, or a folder with a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.models.architectures import plain_linears
from slimplus.utils.errors import InputError, TemporaryFailure, first_line, is_full

UNREADABLE = (OSError, ValueError, SafetensorError, StrictDataclassError)  # what transformers raises for bad files


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
            raise self._explain(error) from error
        return replace(self, revision=Path(file).parents[len(Path(name).parts) - 1].name)  # …/snapshots/COMMIT/NAME

    def _arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that every `from_pretrained` of this source takes."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "revision": self.revision or "main"}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    def _explain(self, error: Exception) -> ModelLoadError | TemporaryFailure:
        """Return the error to raise in the place of one that the hub client or transformers raised."""
        if is_full(error):
            return TemporaryFailure(
                f"model.path: no space is left to download {self.path}; free some, or set HF_HOME to another disk"
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
        except UNREADABLE as error:
            raise self._explain(error) from error
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
            check_tokenizer_file(self.path)
            return AutoTokenizer.from_pretrained(self.path, **self._arguments())
        except UNREADABLE as error:
            raise self._explain(error) from error

    def model(self) -> PreTrainedModel:
        """Load the model on the CPU, in its stored dtype (or `dtype`), in evaluation mode, frozen.

        Raises:
            ModelLoadError: if the model cannot be loaded.
            TemporaryFailure: if the disk is full.
        """
        # A GGUF file stores blocks of integers, not a dtype; bfloat16 is what dequantized weights are served in.
        dtype = "bfloat16" if self.dtype == "auto" and self.gguf_file else self.dtype
        arguments = self._arguments()
        if self.gguf_file and hasattr(transformers, "GgufConfig"):  # newer versions keep the integers by default
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        try:
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, **arguments)
        except UNREADABLE as error:
            raise self._explain(error) from error
        return plain_linears(model.eval().requires_grad_(False))


def check_tokenizer_file(folder: str | Path) -> None:
    """Check that tokenizer.json is whole, if a local folder holds one.

    The library tokenizers raises a bare Exception for half a copy of the file, which nothing should have to catch.

    Raises:
        ValueError: if tokenizer.json is not JSON.
    """
    file = Path(folder, "tokenizer.json")
    if file.is_file():
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer.json is damaged: {error}") from error


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device: its weights have shapes and take no memory.

    Raises:
        UnsupportedModelError: if the model has no list of blocks.
    """
    with torch.device("meta"):
        return plain_linears(AutoModelForCausalLM.from_config(config))
