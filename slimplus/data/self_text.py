"""Calibration text that a model writes itself: how its windows begin, and how the model goes on.

A model is not stopped at its end-of-text token: as in the packed documents that it was trained on, the next text
follows. So every window is full, and holds what the model itself would have read after such a beginning.

References: LLM-QAT (Liu et al. 2023, arXiv 2305.17888) continues single tokens; Magpie (Xu et al. 2024, arXiv
2406.08464) has instruct models write the user's message after the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.data.formats import find_format
from slimplus.data.text import TextError, read_text
from slimplus.data.windows import draw_prefixes
from slimplus.utils.errors import named_first_line

MARKER = "USERMESSAGE"  # stands for the user's message, so that the template's text before it can be found


@dataclass(frozen=True)
class Beginnings:
    """What the windows begin with.

    Attributes:
        prompts: source of prompts or of a text to continue, see `read_text`; None for no prompts.
        prefix_tokens: tokens of the text to continue; None where each row of the source is a prompt.
        chat: whether prompts are put into the tokenizer's chat template.
        seed: seed of the choice among the prompts.
    """

    prompts: str | None = None
    prefix_tokens: int | None = None
    chat: bool = False
    seed: int = 0

    def tokens(self, tokenizer: PreTrainedTokenizerBase, windows: int, limit: int) -> list[list[int]]:
        """Return the tokens that each of `windows` windows begins with; prompts come again if there are fewer.

        Args:
            tokenizer: the model's tokenizer.
            windows: number of windows.
            limit: characters after which no further prompt is read.

        Raises:
            TextError: if there are no prompts, or the tokenizer has no chat template or no token to begin with.
        """
        if self.chat and not tokenizer.chat_template:
            raise TextError(
                "data.generation.chat: the model's tokenizer has no chat template; give false, or an instruct model"
            )
        if self.prompts is None:
            return [_template_start(tokenizer) if self.chat else [_first_token(tokenizer)]] * windows
        text = _read(self.prompts, limit)
        if self.prefix_tokens is not None:
            drawn = draw_prefixes(text, tokenizer, windows, self.prefix_tokens, self.seed)
            return [list(map(int, window)) for window in drawn]
        is_text = find_format(Path(self.prompts)) == ".txt"
        rows = text.joined.splitlines() if is_text else text.documents
        prompts = [row for row in rows if row.strip()]
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.seed)).tolist()
        chosen = [prompts[index] for index in order[:windows]]
        encoded = [
            _encode_chat(tokenizer, prompt) if self.chat else tokenizer(prompt)["input_ids"] for prompt in chosen
        ]
        return [encoded[window % len(encoded)] for window in range(windows)]


def _read(prompts: str, limit: int) -> Any:
    """Return the text of the prompts; of rows that hold chats, the first message of the user is taken."""
    try:
        return read_text(prompts, "calibration", limit=limit, render_chat=_first_message)
    except TextError as error:
        said = str(error).replace("data.calibration.path", "data.generation.prompts")
        remedy = "name the column that holds the text in data.calibration.column"
        raise TextError(said.replace(remedy, "rename the column that holds the prompts to text")) from error


def _first_message(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the first message of the user in a chat; empty if there is none."""
    return next((str(message["content"]) for message in messages if message["role"] == "user"), "")


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the beginning-of-text token, or else the end-of-text token, after which a new text begins."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise TextError(
        "data.calibration=self: the model's tokenizer has neither a BOS nor an EOS token to begin with; "
        "give data.generation.prompts"
    )


def _encode_chat(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Return the tokens of a chat up to where the assistant answers a message."""
    return _tokens(tokenizer, _render(tokenizer, message, add_generation_prompt=True))


def _template_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of the chat template before the user's message."""
    before, found, _ = _render(tokenizer, MARKER, add_generation_prompt=False).partition(MARKER)
    if not found:
        raise TextError(
            "data.generation.chat: the tokenizer's chat template does not show the user's message as it is; "
            "give data.generation.prompts"
        )
    return _tokens(tokenizer, before) or [_first_token(tokenizer)]


def _render(tokenizer: PreTrainedTokenizerBase, message: str, add_generation_prompt: bool) -> str:
    """Return a chat that holds one message of the user, written out by the chat template."""
    chat = [{"role": "user", "content": message}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, ValueError, TypeError) as error:
        raise TextError(
            f"data.generation.chat: the tokenizer's chat template refuses a message ({named_first_line(error)}); give "
            "false"
        ) from error


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text whose special tokens are written out."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class _Finite(LogitsProcessor):
    """Check that a model's predictions are finite: draws from others crash on a GPU."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.logsumexp(-1)).all():
            raise ValueError("the model predicts NaN or infinity: its activations overflowed")
        return scores


@torch.no_grad()
def write_windows(
    model: PreTrainedModel, beginnings: Sequence[Sequence[int]], length: int, temperature: float, seed: int
) -> Tensor:
    """Return windows that a model has written, each after its beginning.

    Shorter beginnings are padded at the left while the model writes; the windows do not hold the padding.

    Args:
        model: the model, on its device.
        beginnings: the tokens that each window begins with, fewer than `length`.
        length: tokens in a window.
        temperature: temperature of the draws, above 0.
        seed: seed of the draws.

    Returns:
        `[windows, length]`, int64, on the CPU.

    Raises:
        ValueError: if the model predicts NaN or infinity.
    """
    longest, shortest = max(map(len, beginnings)), min(map(len, beginnings))
    paddings = [longest - len(tokens) for tokens in beginnings]
    rows = [[tokens[0]] * padding + list(tokens) for tokens, padding in zip(beginnings, paddings, strict=True)]
    mask = [[0] * padding + [1] * (longest - padding) for padding in paddings]
    # The model's own settings, such as a repetition penalty or an end-of-text token to stop at, would change the text.
    model.generation_config = GenerationConfig()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        written: Any = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            max_new_tokens=length - shortest,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([_Finite()]),
        )
    return torch.stack([row[padding : padding + length] for row, padding in zip(written.cpu(), paddings, strict=True)])
