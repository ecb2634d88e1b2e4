"""The figures of a model's answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimplus.evaluation.answers import Answer, answer, degeneration, figures


@pytest.mark.parametrize(
    ("tokens", "repetition"),
    [((), 0.0), ((1, 2, 3), 0.0), ((1, 2, 3, 4, 5), 0.0), ((7,) * 13, 0.9), ((1, 2, 3, 4) * 2, 0.2)],
)
def test_repetition_is_the_share_of_runs_written_before(tokens: tuple[int, ...], repetition: float) -> None:
    assert Answer(tokens, "x").repetition == pytest.approx(repetition)


@pytest.mark.parametrize(
    ("text", "empty", "garbled"),
    [
        ("", True, False),
        (" \n\t", True, False),
        ("Sense, naïve: 道 😀\n\tx", False, False),
        ("cut in a character \ufffd", False, False),
        ("bro\ufffdken", False, True),
        ("a bell \x07 rings", False, True),
    ],
)
def test_empty_and_garbled_answers_are_seen(text: str, empty: bool, garbled: bool) -> None:
    found = Answer((1, 2), text)
    assert (found.is_empty, found.is_garbled) == (empty, garbled)


def test_figures_of_answers() -> None:
    found = figures([Answer((1, 2, 3, 1, 2), "a"), Answer((9,) * 11, "b"), Answer((), "")])
    assert found == {
        "distinct_1": 4 / 16,
        "distinct_2": (3 + 1) / (4 + 10),
        "repetition": pytest.approx((0 + 7 / 8 + 0) / 3),
        "length": pytest.approx(16 / 3),
        "empty": 1,
        "garbled": 0,
        "repeating": 1,
        "failed": 2,
        "answers": ["a", "b", ""],
    }


@pytest.mark.parametrize(
    ("full", "quantized", "warns"),
    [(0, 0, False), (0, 1, False), (0, 2, True), (1, 1, False), (1, 4, True), (4, 0, False)],
)
def test_a_warning_is_of_what_the_quantized_model_alone_fails_at(full: int, quantized: int, warns: bool) -> None:
    def failing(count: int) -> dict[str, Any]:
        return figures([Answer((), "")] * count + [Answer((1, 2), "sense")] * (4 - count))

    said = degeneration({"prompts": list("abcd"), "full": failing(full), "quantized": failing(quantized)})
    assert bool(said) == warns
    if said:
        assert said == (
            f"generation degenerates: {quantized} of 4 answers of the quantized model fail ({quantized} empty), {full} "
            "of the full-precision one"
        )


def test_answers_are_what_the_model_generates(model: Any, tokenizer: Any) -> None:
    first, second = answer(model, tokenizer, ["The city", "def f(x):"], 12)
    for found, prompt in ((first, "The city"), (second, "def f(x):")):
        inputs = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        new = [token for token in written[inputs["input_ids"].shape[1] :].tolist() if token]
        assert list(found.tokens) == new
        assert found.text == tokenizer.decode(new)


def test_a_chat_template_makes_a_message_of_a_prompt(tokenizer: Any) -> None:
    seen = []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(tokenizer.decode(input_ids[0]))
        return input_ids

    model: Any = SimpleNamespace(device=torch.device("cpu"), generate=generate)
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
    try:
        (found,) = answer(model, tokenizer, ["Hello"], 8)
    finally:
        tokenizer.chat_template = template
    assert seen == ["[user] Hello"]
    assert found.is_empty
