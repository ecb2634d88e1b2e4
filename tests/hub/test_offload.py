"""Packed models of which `device_map` leaves a part on the disk: accelerate brings that in for each forward."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import slimplus
from slimplus.pipeline import run as pipeline
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker
from tests.support.recipes import Arguments

HERE = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
MAP = dict.fromkeys(HERE, "cpu") | {"model.layers.0": "disk"}


@pytest.fixture(scope="module")
def with_biases(arguments: Arguments, make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint whose q, k and v have biases."""
    folder = tmp_path_factory.mktemp("qwen2")
    pipeline.run(
        load_recipe(
            arguments(folder, "quantization.method=rtn", "quantization.group_size=32", model=make_model("qwen2"))
        )
    )
    return folder / "packed"


def load(folder: Path, tmp_path: Path, offload_buffers: bool) -> Any:
    return slimplus.load(
        folder,
        dtype=torch.bfloat16,
        device_map=MAP,
        offload_folder=str(tmp_path / "offloaded"),
        offload_buffers=offload_buffers,
    )


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_logits_are_those_of_the_whole_model(with_biases: Path, tmp_path: Path, offload_buffers: bool) -> None:
    tokens = torch.arange(12)[None]
    model = load(with_biases, tmp_path, offload_buffers)
    assert model.model.layers[0].self_attn.q_proj.bias.is_meta
    assert model.model.layers[0].self_attn.q_proj.scales.is_meta is offload_buffers
    with torch.inference_mode():
        found, expected = model(tokens).logits, slimplus.load(with_biases, dtype=torch.bfloat16)(tokens).logits
    assert (found - expected).float().norm() < 0.1 * expected.float().norm()  # other products, in bfloat16


def test_what_is_offloaded_is_checked(with_biases: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(with_biases, tmp_path / "packed")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.group_index"].fill_(1)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj: group_index is not a permutation"):
        load(copy, tmp_path, offload_buffers=True)
