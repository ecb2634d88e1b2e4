"""What is wrong with the files of a model is said with the file's name, and others are left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from slimplus.models.loading import ModelSource
from slimplus.models.source_files import INDEX, folder_problem, location_problem, weight_files
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker

WEIGHTS = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(make_model: ModelMaker, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_model("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in two files."""
    tensors = load_file(folder / WEIGHTS)
    places = {name: SHARDS[number % 2] for number, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder / WEIGHTS).unlink()
    return folder


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def dangling(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (WEIGHTS, half, "is damaged or cut short"),
        (WEIGHTS, pointer, "is a pointer of Git LFS, not the file itself; run `git lfs pull`"),
        (WEIGHTS, dangling, "is a link to nowhere, which does not exist"),
        (WEIGHTS, lambda file: file.write_bytes(b""), "is empty"),
        ("config.json", pointer, "is a pointer of Git LFS"),
        ("config.json", half, "is damaged: "),
        ("config.json", lambda file: file.write_text("[]"), "is damaged: it holds no JSON object"),
        ("tokenizer.json", half, "is damaged: "),
        ("tokenizer.json", dangling, "is a link to nowhere"),
        ("generation_config.json", pointer, "is a pointer of Git LFS"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, damage: Callable[[Path], None], said: str) -> None:
    assert folder_problem(folder) is None
    damage(folder / name)
    problem = location_problem(str(folder), None, None) or ""
    assert problem.startswith(f"model.path: {folder / name} {said}")
    assert "login" not in problem


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "README.md", "model.safetensors.bak"])
def test_a_file_that_is_not_read_may_be_anything(folder: Path, name: str) -> None:
    dangling(folder / name)
    assert folder_problem(folder) is None
    assert weight_files(folder, None) == [folder / WEIGHTS]


def test_a_folder_without_weights_says_what_it_holds(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    assert "holds no weights: consolidated.safetensors has another name than model.safetensors or" in str(
        folder_problem(folder)
    )
    (folder / "consolidated.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json is there" in str(folder_problem(folder))
    (folder / "adapter_config.json").write_text("{}")
    assert "it is an adapter; merge it into its model" in str(folder_problem(folder))
    (folder / "m.gguf").write_bytes(b"GGUF")
    assert "give model.gguf_file=m.gguf" in str(folder_problem(folder))


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert folder_problem(folder) == (
        f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json of the model into it"
    )


def test_more_blocks_than_tensors_are_not_built(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 10**12}))
    assert "num_hidden_layers: 1000000000000 does not fit the 20 tensors" in str(folder_problem(folder))


def test_shards_are_looked_at_one_by_one(sharded: Path) -> None:
    assert folder_problem(sharded) is None
    assert weight_files(sharded, None) == [sharded / name for name in (INDEX, *SHARDS)]
    half(sharded / SHARDS[1])
    assert f"{sharded / SHARDS[1]} is damaged or cut short" in str(folder_problem(sharded))
    (sharded / SHARDS[1]).unlink()
    assert f"{sharded / SHARDS[1]} is missing, and {INDEX} names it" in str(folder_problem(sharded))
    shutil.copy(sharded / SHARDS[0], sharded / SHARDS[1])
    assert f"is both in {sharded / SHARDS[0]} and in {SHARDS[1]}" in str(folder_problem(sharded))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "is damaged: it holds no JSON object"),
        ("{", "is damaged: "),
        ('{"weight_map": {}}', "names no shards"),
        ('{"weight_map": 3}', "is no index of shards"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "names '../b.safetensors', which is no file beside it"),
        ('{"weight_map": {"a": [1]}}', "is no index of shards"),
    ],
)
def test_a_damaged_index_is_named(sharded: Path, content: str, said: str) -> None:
    (sharded / INDEX).write_text(content)
    problem = str(folder_problem(sharded))
    assert problem.startswith(f"{sharded / INDEX} {said}")


def test_a_gguf_file_is_looked_at_as_well(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    pointer(file)
    assert "is a pointer of Git LFS" in str(location_problem(str(tmp_path), "m.gguf", None))
    file.write_bytes(b"GGML....")
    assert f"{file} is no GGUF file" in str(location_problem(str(tmp_path), "m.gguf", None))
    with pytest.raises(InputError, match="holds no weights: give model.gguf_file=m.gguf"):
        weight_files(tmp_path, None)


@pytest.mark.parametrize("size", [20, 30, 200, 900])
def test_a_gguf_file_cut_short_is_a_sentence(tmp_path: Path, size: int) -> None:
    file = tmp_path / "m.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_string("general.description", "x" * 600)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.write_bytes(file.read_bytes()[:size])
    source = ModelSource(str(tmp_path), "m.gguf")
    part = source.config if size < 900 else source.model  # the end of the file holds the weights alone
    with pytest.raises(InputError, match=r"cannot load .*; check m.gguf, or download the model again"):
        part()
