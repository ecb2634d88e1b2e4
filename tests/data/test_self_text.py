"""Text that a model writes itself: its beginnings, and that it is drawn from the model's own predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from slimplus.data.self_text import Beginnings, write_windows
from slimplus.data.text import TextError
from slimplus.models.loading import ModelSource
from tests.support.models import ModelMaker

LIMIT = 10_000
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(make_model: ModelMaker) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(make_model("llama"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(make_model: ModelMaker) -> Any:
    """A model with settings for generation that would change the text, and that says "</s>" now and then."""
    model = ModelSource(str(make_model("llama"))).model().float()
    model.generation_config = GenerationConfig(eos_token_id=list(range(100)), repetition_penalty=5.0, top_k=1)
    return model


def texts(tokenizer: Any, beginnings: list[list[int]]) -> list[str]:
    return [tokenizer.decode(tokens) for tokens in beginnings]


def test_without_prompts_a_window_begins_with_bos_or_eos(tokenizer: Any) -> None:
    assert Beginnings().tokens(tokenizer, 3, LIMIT) == [[0]] * 3
    tokenizer.bos_token, tokenizer.eos_token = None, "a"
    assert texts(tokenizer, Beginnings().tokens(tokenizer, 1, LIMIT)) == ["a"]
    tokenizer.eos_token = None
    with pytest.raises(
        TextError, match=r"neither a BOS nor an EOS token to begin with; give data\.generation\.prompts"
    ):
        Beginnings().tokens(tokenizer, 1, LIMIT)


def test_prompts_are_lines_or_rows_and_come_again(tokenizer: Any, tmp_path: Path) -> None:
    lines, rows, chats = tmp_path / "lines.txt", tmp_path / "rows.jsonl", tmp_path / "chats.jsonl"
    lines.write_text("one\n\ntwo\nthree\n")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two\nlines")))
    chat = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]
    chats.write_text(json.dumps({"messages": [*chat, {"role": "assistant", "content": "Yes?"}]}) + "\n")
    found = texts(tokenizer, Beginnings(str(lines)).tokens(tokenizer, 5, LIMIT))
    assert sorted(found[:3]) == ["one", "three", "two"]
    assert found[3:] == found[:2]
    assert set(texts(tokenizer, Beginnings(str(rows)).tokens(tokenizer, 4, LIMIT))) == {"one", "two\nlines"}
    assert texts(tokenizer, Beginnings(str(chats)).tokens(tokenizer, 1, LIMIT)) == ["Hi"]
    others = [Beginnings(str(lines), seed=seed).tokens(tokenizer, 3, LIMIT) for seed in range(6)]
    assert len({str(each) for each in others}) > 1


def test_prompts_go_through_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("Hi\n")
    found = Beginnings(str(lines), chat=True).tokens(tokenizer, 1, LIMIT)
    assert texts(tokenizer, found) == ["<user>Hi</s><assistant>"]
    assert 0 in found[0], "the template's </s> is one token"
    assert texts(tokenizer, Beginnings(chat=True).tokens(tokenizer, 2, LIMIT)) == ["<user>"] * 2


def test_prefixes_are_tokens_from_anywhere_in_a_text(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number:04d}" for number in range(500)))
    found = texts(tokenizer, Beginnings(str(text), prefix_tokens=8).tokens(tokenizer, 300, LIMIT))
    assert all(len(prefix) == 8 and int(prefix[4:]) == int(prefix[:4]) + 1 for prefix in found)
    assert len(set(found)) == 250, "all 250 windows of the text, and 50 of them again"
    assert found[250:] == found[:50]
    with pytest.raises(TextError, match=r"data\.generation\.prompts: .* is shorter than .*prefix_tokens=3000"):
        Beginnings(str(text), prefix_tokens=3000).tokens(tokenizer, 1, LIMIT)


def test_what_is_missing_is_said(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"^data\.generation\.prompts: there is no file .*none\.txt"):
        Beginnings(str(tmp_path / "none.txt")).tokens(tokenizer, 1, LIMIT)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(
        TextError, match=r"data\.generation\.chat: .* refuses a message \(TemplateError: no users here\)"
    ):
        Beginnings(chat=True).tokens(tokenizer, 1, LIMIT)
    tokenizer.chat_template = "{{ messages[0].content | lower }}"
    with pytest.raises(TextError, match=r"data\.generation\.chat: .* does not show the user's message as it is"):
        Beginnings(chat=True).tokens(tokenizer, 1, LIMIT)
    tokenizer.chat_template = None
    with pytest.raises(TextError, match=r"data\.generation\.chat: the model's tokenizer has no chat template"):
        Beginnings(chat=True).tokens(tokenizer, 1, LIMIT)


def test_a_cold_model_writes_the_likeliest_tokens_after_beginnings_of_any_length(model: Any) -> None:
    beginnings = [[5, 6, 7, 8, 9], [40], [50, 60, 70]]
    windows = write_windows(model, beginnings, 20, temperature=1e-6, seed=0)
    for window, beginning in zip(windows, beginnings, strict=True):
        expected = list(beginning)
        while len(expected) < 20:
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert window.tolist() == expected


def test_tokens_are_drawn_from_the_models_predictions(model: Any) -> None:
    drawn = write_windows(model, [[33]] * 4000, 2, temperature=2.0, seed=1)[:, 1]
    expected = (model(torch.tensor([[33]])).logits[0, -1] / 2).softmax(-1)
    assert expected.max() < 0.5, "else there would be little to draw"
    assert (drawn < 100).any(), "end-of-text tokens of the model's own settings"
    frequencies = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert (frequencies - expected).abs().sum() / 2 < 0.1
    likeliest = int(expected.argmax())
    assert frequencies[likeliest] == pytest.approx(float(expected[likeliest]), abs=0.03)


def test_draws_follow_the_seed_and_leave_others_alone(model: Any) -> None:
    torch.manual_seed(3)
    one = write_windows(model, [[1], [1]], 12, 1.0, seed=7)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(write_windows(model, [[1], [1]], 12, 1.0, seed=7), one)
    assert not torch.equal(write_windows(model, [[1], [1]], 12, 1.0, seed=8), one)
    assert not torch.equal(one[0], one[1])


def test_predictions_that_overflow_are_refused(make_model: ModelMaker) -> None:
    model = ModelSource(str(make_model("llama"))).model().float()
    model.get_input_embeddings().weight.data[3] = torch.inf
    with pytest.raises(ValueError, match="the model predicts NaN or infinity"):
        write_windows(model, [[3]], 8, 1.0, seed=0)
