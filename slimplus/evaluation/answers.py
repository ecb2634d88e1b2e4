"""Whether a model writes sense: its answers to a few prompts, and what counts them.

Likelihoods can look well while generation fails. Figures of all answers to the prompts, greedily decoded:

| name | meaning |
|---|---|
| distinct_1, distinct_2 | distinct tokens, and pairs of tokens, over all of them (https://arxiv.org/abs/1510.03055) |
| repetition | share of an answer's runs of four tokens that it has written before, averaged over the answers |
| length | tokens of an answer, on average |
| empty | answers without a character besides white space |
| garbled | answers with bytes that are no UTF-8, or with control characters |
| repeating | answers more than half of whose runs of four tokens are repeated |
| failed | answers that are empty, garbled or repeating |
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.evaluation.generation import Sampling, decode, prompt_inputs

RUN = 4  # tokens of a run that counts as repeated
MOST_REPEATED = 0.5  # of an answer's runs
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # at an answer's end: the last character's other bytes would follow


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt.

    Attributes:
        tokens: the new tokens, without those that end a text.
        text: their text.
    """

    tokens: tuple[int, ...]
    text: str

    @property
    def repetition(self) -> float:
        """Share of the runs of four tokens that stand in the answer before."""
        runs = ngrams(self.tokens, RUN)
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read."""
        return not self.text.strip()

    @property
    def is_garbled(self) -> bool:
        """Whether there are characters that no text has."""
        return any(
            character == UNFINISHED
            or (unicodedata.category(character) in ("Cc", "Cn", "Co") and character not in "\n\r\t")
            for character in self.text.rstrip(UNFINISHED)
        )

    @property
    def is_repeating(self) -> bool:
        """Whether most of it is repeated."""
        return self.repetition > MOST_REPEATED


def ngrams(tokens: Sequence[int], length: int) -> list[tuple[int, ...]]:
    """Return all runs of `length` tokens."""
    return [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> list[Answer]:
    """Return a model's greedy answers, one prompt after the other, so that no padding is in the way.

    A tokenizer's chat template, if it has one, makes a user's message of a prompt.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        prompts: what to answer, or to continue.
        new_tokens: tokens of an answer at most.
    """
    found = []
    for prompt in prompts:
        inputs = prompt_inputs(tokenizer, prompt, chat=bool(tokenizer.chat_template))
        given = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        generate: Any = model.generate
        written = generate(**given, **Sampling(new_tokens).arguments(), pad_token_id=tokenizer.eos_token_id)
        tokens = written[0, given["input_ids"].shape[1] :].cpu()
        special = torch.tensor(tokenizer.all_special_ids, dtype=tokens.dtype)
        found.append(Answer(tuple(tokens[~torch.isin(tokens, special)].tolist()), decode(tokenizer, tokens)))
    return found


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the figures of a model's answers and their texts, under the names that metrics.json gives them."""
    figures: dict[str, Any] = {}
    for length in (1, 2):
        runs = [run for each in answers for run in ngrams(each.tokens, length)]
        figures[f"distinct_{length}"] = len(set(runs)) / len(runs) if runs else 0.0
    failed = [each.is_empty or each.is_garbled or each.is_repeating for each in answers]
    return figures | {
        "repetition": sum(each.repetition for each in answers) / len(answers),
        "length": sum(len(each.tokens) for each in answers) / len(answers),
        "empty": sum(each.is_empty for each in answers),
        "garbled": sum(each.is_garbled for each in answers),
        "repeating": sum(each.is_repeating for each in answers),
        "failed": sum(failed),
        "answers": [each.text for each in answers],
    }


def degeneration(generation: dict[str, Any]) -> str | None:
    """Return a sentence if two answers, and a quarter of all, fail at the quantized model more than at the full one.

    Args:
        generation: `generation` in metrics.json.
    """
    full, quantized, count = generation["full"], generation["quantized"], len(generation["prompts"])
    if full is None or quantized is None or quantized["failed"] - full["failed"] < min(count, max(2, count / 4)):
        return None
    kinds = [f"{quantized[kind]} {kind}" for kind in ("empty", "garbled", "repeating") if quantized[kind]]
    return (
        f"generation degenerates: {quantized['failed']} of {count} answers of the quantized model fail "
        f"({', '.join(kinds)}), {full['failed']} of the full-precision one"
    )
