"""Texts that models are measured on: how they are read, and what the figures of one are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.data.text import characters_to_read, read_text
from slimplus.data.windows import chat_renderer, evaluation_windows
from slimplus.evaluation.divergence import statistics


@dataclass(frozen=True)
class TextConfig:
    """A text, and how it is read.

    Attributes:
        path: name or path of the text.
        windows: windows at most, from its start.
        sequence_length: tokens in a window.
        column: column that holds the text, see `read_text`.
        stride: tokens of the text from the start of a window to the next; None puts them side by side.
        bos: where the beginning-of-text token stands, see `evaluation_windows`.
    """

    path: str
    windows: int
    sequence_length: int
    column: str | None = None
    stride: int | None = None
    bos: Literal["auto", "never", "window"] = "auto"


@dataclass(frozen=True, eq=False)
class EvaluationText:
    """Windows of a text, and which predictions of them count.

    Attributes:
        config: how the text is read.
        tokens: `[windows, sequence_length]`, int64.
        counted: `[windows, sequence_length - 1]`, bool, see `counted_tokens`.
        fingerprint: SHA-256 over the text, the tokenizer and how the text is read.
    """

    config: TextConfig
    tokens: Tensor
    counted: Tensor
    fingerprint: str

    @property
    def protocol(self) -> dict[str, Any]:
        """How the text is read, under the names that metrics.json gives it."""
        length = self.tokens.shape[1]
        return {
            "text": self.config.path,
            "windows": len(self.tokens),
            "sequence_length": length,
            "stride": self.config.stride or length - (self.config.bos == "window"),
            "bos": self.config.bos,
            "predictions": int(self.counted.sum()),
            "fingerprint": self.fingerprint,
        }

    def divergence(self, divergences: Tensor, agreements: Tensor) -> dict[str, float]:
        """Return the divergence of the predictions that count.

        Args:
            divergences: KL divergence of each prediction, one window after the other, float64.
            agreements: whether each prediction has the reference's top token.
        """
        counted = self.counted.flatten()
        return statistics(divergences[counted], agreements[counted])


def read_evaluation_text(
    config: TextConfig, tokenizer: PreTrainedTokenizerBase, cache: Path | None = None
) -> EvaluationText:
    """Read a text and cut its windows.

    Args:
        config: how the text is read.
        tokenizer: the model's tokenizer.
        cache: file that keeps the windows.

    Raises:
        TextError: if the text cannot be read, or is shorter than one window.
    """
    limit = characters_to_read(config.windows * config.sequence_length)
    text = read_text(config.path, "evaluation", config.column, limit, chat_renderer(tokenizer)).joined
    windows = evaluation_windows(
        text, tokenizer, config.windows, config.sequence_length, cache, config.stride, config.bos
    )
    counted = counted_tokens(len(windows.tokens), config.sequence_length, config.stride)
    return EvaluationText(config, windows.tokens, counted, windows.fingerprint)


def counted_tokens(windows: int, sequence_length: int, stride: int | None = None) -> Tensor:
    """Return which predictions of evaluation windows count: each token of the text once, with the longest context.

    The first token of a window has no prediction. Where windows overlap, the first window counts as a whole, and of
    each other one only the tokens that the window before it does not hold.

    Returns:
        `[windows, sequence_length - 1]`, bool; the first column is of a window's second token.
    """
    counted = torch.ones(windows, sequence_length - 1, dtype=torch.bool)
    if stride is not None:
        counted[1:, : max(sequence_length - 1 - stride, 0)] = False
    return counted
