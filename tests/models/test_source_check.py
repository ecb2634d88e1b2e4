"""What `slimplus check` says of a model before a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimplus.models.loading import ModelSource
from slimplus.models.source_check import check_source
from tests.support.models import ModelMaker


@pytest.fixture
def folder(make_model: ModelMaker, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_model("llama"), tmp_path / "model"))


def test_a_sound_model_is_described(folder: Path) -> None:
    report = check_source(ModelSource(str(folder)))
    assert (report.problems, report.notes) == ([], [])
    assert report.facts == {
        "architecture": "llama",
        "blocks": "2",
        "parameters": "102,784",
        "embedding": "257 rows",
        "positions": "256",
        "dtype": "BF16 (20 tensors)",
        "head": "tied to the embedding",
        "tokenizer": "TokenizersBackend, 257 tokens",
    }


def test_a_table_of_positions_is_told(make_model: ModelMaker) -> None:
    assert check_source(ModelSource(str(make_model("opt")))).facts["positions"] == "256, held in a table"


def test_each_problem_is_told(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    report = check_source(ModelSource(str(folder)))
    assert report.problems[0].startswith("model.norm.weight holds infinity; download the weights again")
    assert "tokenizer" in report.problems[1]
    assert report.facts["architecture"] == "llama"


def test_what_is_unusual_is_no_problem(folder: Path) -> None:
    """A head of its own that the configuration denies, and a token that no text of a run need hold."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 257, "content": "<|sys|>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    report = check_source(ModelSource(str(folder)))
    assert report.problems == []
    assert report.facts["head"] == "weights of its own"
    own, token = report.notes
    assert own.startswith("config.json says that the head is tied to the embedding (tie_word_embeddings), but")
    assert "knows 1 tokens that the embedding of 257 rows has no row for, such as '<|sys|>' (257)" in token
