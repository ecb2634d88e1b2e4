"""Recipes go through the real parser; what is wrong is said in the user's words, all of it at once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slimplus.recipe.parsing import describe_type, load_recipe, recipe_names
from slimplus.recipe.schema import Recipe, keys, to_yaml
from slimplus.recipe.section import RecipeError

RECIPE = "recipe=llama7b_2bit"


def problems(*arguments: str) -> list[str]:
    """The lines said about these arguments."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(arguments)
    return str(caught.value).splitlines()


def test_overrides_set_dotted_paths_to_yaml_values() -> None:
    recipe = load_recipe(
        [
            "recipe=llama7b_2bit",
            "model.config.num_hidden_layers=2",
            "model.gguf_file=a=b.gguf",
            "data.calibration={path: c4}",
            "training.learning_rate=1e-3",
            "training.weight_decay=1",
            "dry_run=true",
            "resume=never",
        ]
    )
    assert recipe.model.config == {"model_type": "llama", "num_hidden_layers": 2}
    assert recipe.model.gguf_file == "a=b.gguf"
    assert recipe.data.calibration.path == "c4"
    assert recipe.training.learning_rate == 0.001
    assert recipe.training.weight_decay == 1.0
    assert recipe.dry_run is True
    assert recipe.resume.start == "never"


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe([RECIPE])
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_a_file_of_ones_own_may_leave_sections_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.v2.yaml"
    file.write_text("model:\n  path: a/b\nquantization: {method: rtn, bits: 4}\ntraining:\n  # nothing\n")
    recipe = load_recipe([f"recipe={file}"])
    assert recipe.run_dir == "runs/mine.v2"
    assert recipe.data.samples == 128


def test_the_written_recipe_is_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=llama3_8b_2bit", "seed=3", "run_dir=somewhere"])
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe([f"recipe={file}"]) == recipe


def values_of(key: str) -> st.SearchStrategy[Any]:
    """Values that a key takes, from what the help says of it."""
    said = describe_type(keys()[key])
    if said.startswith("text"):
        return st.text(min_size=1).filter(lambda text: text.isprintable())
    if said == "{text: any, ...} | null":
        return st.none() | st.dictionaries(st.sampled_from(["hidden_size", "rope_theta"]), st.integers())
    if said == "{integer: number, ...}":
        return st.dictionaries(st.integers(1, 8), st.floats(0.1, 10), max_size=3)
    if said == "[integer, ...]":
        return st.just([1, 2, 3, 4])
    if said == "[text, ...]":
        return st.lists(st.text("abc/.", min_size=1), max_size=3)
    if said.startswith("[{path: text,"):
        return st.lists(st.text("abc/.", min_size=1), max_size=3, unique=True)
    if said.startswith("["):
        choices = said.removeprefix("[").removesuffix(", ...]").split(" | ")
        return st.lists(st.sampled_from(choices), min_size=1)
    if said.startswith("integer"):
        return st.integers(8, 9) if ">= 8" in said else st.integers(2, 7)
    if said.startswith("number"):
        return st.floats(1e-12, 1.0, exclude_max="< 1" in said)
    if said == "true | false":
        return st.booleans()
    return st.sampled_from([int(option) if option.isdigit() else option for option in said.split(" | ")])


@given(data=st.data(), key=st.sampled_from(sorted(keys())))
def test_any_value_survives_the_command_line_and_the_written_recipe(
    data: st.DataObject, key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    value = data.draw(values_of(key))
    needs = {
        "trainer.offload": ["trainer.strategy=deepspeed_stage_3"],
        "quantization.size_bytes": ["quantization.allocation=model"],
        "quantization.per_layer": ["quantization.allocation=model"],
        "data.generation.prefix_tokens": ["data.calibration=self", "data.generation.prompts=offline"],
        "end_to_end.tokens": ["data.sequence_length=2", "end_to_end.epochs=1", "end_to_end.batch_size=1"],
    }
    own = ["data.calibration=self"] if key.startswith("data.generation.") else []
    written = json.dumps(value, ensure_ascii=False)
    if key == "training.width_rates":  # JSON has no numbers as keys
        written = yaml.safe_dump(value, default_flow_style=True)
    recipe = load_recipe([RECIPE, *needs.get(key, own), f"{key}={written}"])
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part)
    assert [text.path for text in found] == value if key == "evaluation.texts" else found == value
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe([f"recipe={file}"]) == recipe


@given(key=st.sampled_from([*keys(), "model", "data.calibration", "seed.x", "", "."]) | st.text(), text=st.text())
def test_whatever_is_typed_gives_a_recipe_or_a_recipe_error(key: str, text: str) -> None:
    with contextlib.suppress(RecipeError):  # and no other error
        assert isinstance(load_recipe([RECIPE, f"{key}={text}"]), Recipe)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "quantization.gruop_size=64",
            "quantization.gruop_size: unknown key; did you mean quantization.group_size?",
        ),
        ("gruop_size=64", "gruop_size: unknown key; did you mean quantization.group_size?"),
        ("bits=2", "bits: unknown key; did you mean quantization.bits?"),
        ("quantisation.bits=2", "quantisation.bits: unknown key; did you mean quantization.bits?"),
        ("--seed=3", "--seed: unknown key; did you mean seed?"),
        ("zzz=1", "zzz: unknown key; --help lists the keys"),
        ("quantization.bits=9", "quantization.bits: expected integer >= 1 and <= 8, got 9"),
        (
            "quantization.bits=1",
            "quantization.bits: expected 2 to 7 with quantization.allocation=slimllm, got 1",
        ),
        ("quantization.bits=8", "bits-1 to bits+1"),
        ("quantization.bits=two", "quantization.bits: expected integer >= 1 and <= 8, got 'two'"),
        ("quantization.bits=true", "quantization.bits: expected integer >= 1 and <= 8, got True"),
        ("quantization.bits=2.5", "quantization.bits: expected integer >= 1 and <= 8, got 2.5"),
        ("quantization.group_size=48", "expected 16 | 32 | 64 | 128 | 256 | 512 | 1024, got 48"),
        ("quantization.group_size=8", "columns that share a bit width"),
        (
            "quantization.method=awq",
            "quantization.method: expected rtn | gptq | slimllm | slimllm_plus | qat, got 'awq'",
        ),
        ("quantization.percdamp=0", "quantization.percdamp: expected number > 0 and <= 1, got 0"),
        ("quantization.widths=[2]", "quantization.widths: expected two or more rising widths from 1 to 8, got [2]"),
        ("quantization.widths=[2,3]", "quantization.widths: only quantization.allocation=block and model choose from"),
        (
            "quantization={method: rtn, bits: 2, error_propagation: 1}",
            "quantization.error_propagation: rounding to nearest reads no inputs; give another method",
        ),
        (
            "quantization.per_layer=true",
            "quantization.per_layer: needs quantization.allocation=model, block or uniform; slimllm gives each group",
        ),
        ("quantization.zero_points=whole", "quantization.zero_points: expected fractional | integer, got 'whole'"),
        ("training.width_rates={1:0.5}", "training.width_rates: expected {integer: number, ...}, got {60.5: None}"),
        ("quantization.widths=[1,a]", "quantization.widths: expected [integer, ...], got [1, 'a']"),
        ("training.width_rates={9: 1}", "training.width_rates: expected factors of at least 0 for widths from 1 to 8"),
        ("data.generation.prompts=self", "data.generation.prompts: self is the text that begins with them"),
        (
            "data.calibration=[{path: a.txt, weights: 3}]",
            "data.calibration.path: 'weights' is no key that its elements",
        ),
        ("end_to_end={epochs: 1, distillation: 0}", "end_to_end.distillation: nothing is left to learn from"),
        ("training.learning_rate=fast", "training.learning_rate: expected number > 0 | null, got 'fast'"),
        ("training.learning_rate=.inf", "training.learning_rate: expected number > 0 | null, got inf"),
        ("data.samples=0", "data.samples: expected integer >= 1, got 0 (calibration windows)"),
        ("trainer.devices=0", "trainer.devices: expected integer >= 1, got 0"),
        ("dry_run=1", "dry_run: expected true | false, got 1"),
        (
            "run_dir=2024-01-01",
            "run_dir: expected text, got datetime.date(2024, 1, 1); quote it to keep it text",
        ),
        ("run_dir=", "run_dir: expected text, got None"),
        ("run_dir=''", "run_dir: expected text, got ''"),
        ("seed=2024-99-99", "seed: '2024-99-99' is not valid YAML; quote it"),
        ("seed=[", "seed: '[' is not valid YAML; quote it"),
        ("data.samples.x=1", "data.samples.x: data.samples holds 128, which has no keys inside"),
        ("training=3", "training: expected keys such as training.epochs, got 3"),
        ("model.path", "'model.path' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
    ],
)
def test_one_wrong_argument_is_one_sentence(argument: str, said: str) -> None:
    (line,) = problems(RECIPE, argument)
    assert said in line


@pytest.mark.parametrize("bits", [1, 8])
def test_uniform_methods_take_every_width(bits: int) -> None:
    recipe = load_recipe([RECIPE, "quantization.method=gptq", f"quantization.bits={bits}"])
    assert recipe.quantization.bits == bits


def test_everything_wrong_is_said_at_once() -> None:
    wrong = ["seed=x", "quantization.bits=99", "quantization.gruop_size=64", "data.samples=[", "oops"]
    lines = problems(RECIPE, *wrong)
    assert len(lines) == len(wrong)
    for argument in wrong:
        assert sum(line.strip("'").startswith(argument.split("=")[0]) for line in lines) == 1
    assert not any(word in "\n".join(lines) for word in ("pydantic", "http", "Input should", "type="))


def test_missing_keys_are_named_with_what_they_take(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("seed: 0\n")
    lines = problems(f"recipe={file}")
    assert [line.split(":")[0] for line in lines] == [
        "model.path",
        "quantization.method",
        "quantization.bits",
    ]
    assert "give quantization.bits=VALUE, integer >= 1 and <= 8" in lines[2]


def test_a_recipe_must_be_named() -> None:
    (line,) = problems()
    assert all(name in line for name in recipe_names())


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("smollm2_135m_2bits", "smollm2_135m_2bit?"),
        ("smollm", "smollm2_135m_2bit or smollm2_135m_2bit_best?"),
        ("opt_1.3b", "opt_1.3b_2bit?"),
    ],
)
def test_an_unknown_recipe_gets_a_guess_and_the_list(name: str, guess: str) -> None:
    (line,) = problems(f"recipe={name}")
    assert f"did you mean {guess}" in line
    assert all(known in line for known in recipe_names())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("a: [", "not valid YAML"),
        ("- 1", "must hold keys and values"),
        ("", "must hold keys"),
    ],
)
def test_an_unreadable_recipe_file_is_one_sentence(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    (line,) = problems(f"recipe={file}")
    assert said in line
    assert str(file) in line


@pytest.mark.parametrize("key", ["embedding_bits", "head_bits"])
@pytest.mark.parametrize("value", ["0", "9", "4.5", "true"])
def test_bits_that_cannot_be_packed(key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=rf"quantization\.{key}: expected integer"):
        load_recipe(["recipe=llama7b_2bit", f"quantization.{key}={value}"])


def test_a_further_text_takes_what_it_leaves_out_from_the_first(tmp_path: Path) -> None:
    first = ["data.evaluation.windows=3", "data.evaluation.column=story", "data.evaluation.bos=window"]
    texts = "evaluation.texts=[c4, {path: code.jsonl, column: content, sequence_length: 64, stride: 16}]"
    recipe = load_recipe([RECIPE, *first, texts])
    _, c4, code = recipe.evaluation_texts.values()
    assert (c4.path, c4.windows, c4.sequence_length, c4.column, c4.bos) == ("c4", 3, 2048, None, "window")
    assert (code.windows, code.sequence_length, code.stride, code.column) == (3, 64, 16, "content")
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert load_recipe([f"recipe={file}"]) == recipe


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("data.evaluation.stride=4096", "data.evaluation.stride: 4096 leaves gaps between windows of 2048 tokens"),
        ("evaluation.texts=[{path: a.txt, sequence_length: 8, stride: 9}]", "evaluation.texts.0.stride: 9 leaves gaps"),
        ("evaluation.texts=[a.txt, a.txt]", "evaluation.texts: a text stands twice in the list"),
        ("evaluation.texts=[{path: a.txt, windows: many}]", "evaluation.texts: expected "),
        ("evaluation.texts=5", "evaluation.texts: expected "),
    ],
)
def test_wrong_evaluation_texts_are_one_sentence(argument: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe([RECIPE, argument])
    (line,) = str(caught.value).splitlines()
    assert said in line
