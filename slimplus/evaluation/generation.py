"""Text that a model writes: as one string, or streamed word by word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.data.windows import check_ids
from slimplus.evaluation.decoding import GraphDecoder
from slimplus.hub.checkpoint import load
from slimplus.models.architectures import embedding_rows, position_table
from slimplus.models.loading import UNBUILDABLE, read_tokenizer
from slimplus.utils.errors import InputError, first_line


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: largest number of new tokens.
        temperature: temperature of the draws; 0 takes the likeliest token.
        top_p: probability mass of the tokens to draw from, the likeliest ones.
        seed: seed of the draws.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `model.generate`, which override the sampling of the model's generation config."""
        if self.temperature == 0:
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            return {"max_new_tokens": self.max_new_tokens, **greedy}
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **drawn}


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def find_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is a GPU if there is one, else the CPU.

    Raises:
        InputError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # which the meta device refuses
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device: {name} cannot be used ({first_line(error)}); give cpu, or leave --device out"
        ) from error
    return device


def load_for_generation(folder: Path, device: str, dtype: str) -> LoadedModel:
    """Load the packed checkpoint in a folder, and its tokenizer.

    Args:
        folder: folder of the checkpoint.
        device: name of a device, see `find_device`.
        dtype: dtype of what is not packed, and of the arithmetic; `auto` is the stored one.

    Raises:
        InputError: if there is no such device, or no tokenizer.
    """
    where = str(find_device(device))
    try:
        tokenizer = read_tokenizer(folder, trust_remote_code=False)
    except UNBUILDABLE as error:
        raise InputError(
            f"{folder} has no tokenizer that can be read ({first_line(error)}); export it again"
        ) from error
    return LoadedModel(load(folder, dtype=dtype, device_map=where).eval(), tokenizer)


def stream(loaded: LoadedModel, prompt: str, sampling: Sampling, chat: bool = False) -> None:
    """Write the continuation of a prompt to the standard output, word by word, and a newline.

    Args:
        loaded: the model and its tokenizer.
        prompt: text to continue, or the message to answer.
        sampling: how tokens are chosen.
        chat: whether to put the prompt into the tokenizer's chat template.

    Raises:
        InputError: if the model has no row for a token, or no positions for so many.
    """
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    inputs = prompt_inputs(tokenizer, prompt, chat)
    length = inputs["input_ids"].shape[1]
    check_ids(inputs["input_ids"], embedding_rows(model), tokenizer, "the prompt")
    _check_length(length, sampling.max_new_tokens, position_table(model))
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    torch.manual_seed(sampling.seed)
    generate_function(model)(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        **sampling.arguments(),
        pad_token_id=padding,
        streamer=TextStreamer(cast("Any", _LenientDecoder(tokenizer)), skip_prompt=True),
    )


def generate_function(model: Any) -> Callable[..., Any]:
    """Return the function that continues texts: on a GPU that of a `GraphDecoder`, else the model's own `generate`."""
    on_gpu = model.device.type == "cuda"
    return GraphDecoder(model).generate if on_gpu else cast("Callable[..., Any]", model.generate)


def prompt_inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = False) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of a prompt, `[1, tokens]` each.

    Models refuse what else a tokenizer gives, such as `token_type_ids`.

    Args:
        tokenizer: the model's tokenizer.
        prompt: text to continue, or the message to answer.
        chat: whether to put the prompt into the tokenizer's chat template.
    """
    inputs: Any
    if chat:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_attention_mask=True)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class _LenientDecoder:
    """A tokenizer, as far as a `TextStreamer` needs one, that decodes any tokens."""

    tokenizer: PreTrainedTokenizerBase

    def decode(self, tokens: Tensor, **_: Any) -> str:
        return decode(self.tokenizer, tokens)


def _check_length(prompt: int, new: int, longest: int | None) -> None:
    """Check that a prompt and the new tokens have positions in the model's table, if it has one."""
    if longest is not None and prompt + new > longest:
        remedy = f"give at most {longest - prompt}" if prompt < longest else "shorten the prompt"
        raise InputError(
            f"--max-new-tokens: {prompt} tokens of prompt and {new} new ones are more than the {longest} positions of "
            f"the model; {remedy}"
        )


def continue_text(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = 24) -> str:
    """Return a prompt and its greedy continuation of at most `tokens` tokens, on one line."""
    given = {name: tensor.to(model.device) for name, tensor in prompt_inputs(tokenizer, prompt).items()}
    written = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(decode(tokenizer, written[0]).split())


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> str:
    """Return the text of tokens, without special tokens; bytes that are no UTF-8 become U+FFFD."""
    try:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))
    except UnicodeDecodeError as error:  # from tokenizers that decode bytes themselves, and strictly
        return bytes(error.object).decode("utf-8", "replace")
