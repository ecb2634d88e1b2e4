"""Checkpoints from strangers: whatever is in their files, loading gives a clear error or a model, and nothing else."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

import slimplus
from slimplus.hub.checks import check_architecture, check_packed_tensors, check_quantization, read_headers
from slimplus.hub.transformers_quantizer import SlimplusConfig
from slimplus.utils.errors import InputError
from tests.support.damage import WEIGHTS, header_size
from tests.support.fuzzing import Bomb, damaged, fuzz, refusal


@fuzz(2000)
@given(data=st.data())
def test_a_damaged_config_is_refused_or_describes_layers_of_bounded_size(checkpoint: Path, data: st.DataObject) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        config = damaged(config, lambda options: data.draw(st.sampled_from(options)))

    def check() -> None:
        check_quantization(config.get("quantization_config"))
        check_architecture(config, config["quantization_config"]["modules"])

    if (said := refusal(check)) is not None:
        assert "quantization_config" in said or "config.json" in said
        assert len(said) < 400
        return
    quantization = SlimplusConfig.from_dict(config["quantization_config"])
    # Where the key is missing, the architecture's own number counts, which no stranger chooses.
    assert config.get("num_hidden_layers", 1) <= len(quantization.modules)
    for name, (rows, columns) in quantization.shapes.items():
        assert 1 <= rows < 2**31
        assert sum(quantization.modules[name].values()) == -(-columns // quantization.group_size) < 2**15


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 10**12, r"config\.json: hidden_size: 1000000000000 is not a size"),
        ("n_layer", 10**9, r"config\.json: n_layer: 1000000000 does not fit the 14 packed layers"),
        ("num_experts", 10**6, r"config\.json: num_experts: 1000000 does not fit the 14 packed layers"),
        ("sliding_window", 10**12, r"config\.json: sliding_window: 1000000000000 is larger than"),
        ("model_type", "bert_of_mine", "model_type: 'bert_of_mine' is no causal language model of transformers"),
        ("num_hidden_layers", 10**9, r"config\.json: num_hidden_layers: 1000000000 does not fit the 14 packed layers"),
        ("vocab_size", 2**31 - 1, "cannot be loaded"),
        ("hidden_size", 2**31 - 1, "cannot be loaded"),
        (
            "vocab_size",
            10**8,
            r"embed_tokens\.weight is \[\d+, 64\] in the files, and \[100000000, 64\] by config.json",
        ),
        ("tie_word_embeddings", False, r"the checkpoint lacks the tensor lm_head\.weight"),
        ("head_dim", 2**31 - 1, "cannot be loaded"),
        ("max_position_embeddings", -1, "max_position_embeddings: -1 is not a size"),
        ("num_attention_heads", 0, "num_attention_heads: 0 is not a size"),
        ("quantization_config", [], "is not a packed slimplus checkpoint"),
        ("quantization_config.group_size", 0, "group_size: 0 is not a size"),
        ("quantization_config.group_size", 48, "group_size is 48, not one of 16, 32"),
        ("quantization_config.scale_bits", 4, "scale_bits: 4 is neither 8 nor 16"),
        ("quantization_config.scale_bits", 8, "is F16 .* in the files, and U8 .* by config.json"),
        ("quantization_config.bits", 2.5, r"bits: 2\.5 is not a whole number from 1 to 8"),
        ("quantization_config.modules", {}, "is in one of modules and shapes, not in both"),
        ("quantization_config.shapes", {}, "is in one of modules and shapes, not in both"),
        ("model_type", "no_such_model", "cannot be loaded"),
        (
            "model_type",
            "gemma3n_text",
            "cannot be loaded",
        ),
    ],
)
def test_claims_that_are_refused(checkpoint: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    *path, last = key.split(".")
    parent = config
    for part in path:
        parent = parent[part]
    parent[last] = value
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        slimplus.load(copy)


def test_where_a_checkpoint_lies_on_the_hub_is_asked_in_the_same_words(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    """The check of config.json looks where `from_pretrained` is going to look."""
    asked: list[dict[str, Any]] = []
    read = PretrainedConfig.get_config_dict

    def noted(path: Any, **arguments: Any) -> Any:
        asked.append(arguments)
        return read(checkpoint)

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", noted)
    where: dict[str, Any] = {"revision": "packed", "token": "secret", "subfolder": "inner"}
    with pytest.raises(InputError):  # there is no such repository
        slimplus.load("org/name", dtype=torch.float32, **where)
    assert asked[0] == where


@fuzz(1000)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_leave_all_tensors_as_they_should_be(
    checkpoint: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray((checkpoint / WEIGHTS).read_bytes())
    header = header_size(content)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file = tmp_path / WEIGHTS
    file.write_bytes(content)
    quantization = SlimplusConfig.from_dict(json.loads((checkpoint / "config.json").read_text())["quantization_config"])
    layers = (quantization.group_size, quantization.modules, quantization.shapes)
    if (said := refusal(lambda: check_packed_tensors(read_headers([str(file)]), *layers))) is not None:
        assert str(file) in said or "model." in said


def test_pickled_weights_are_never_opened(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        copy = shutil.copytree(checkpoint, tmp_path / name.split(".")[0])
        (copy / WEIGHTS).unlink()
        (copy / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(InputError):
            slimplus.load(copy)
        with pytest.raises((ValueError, OSError)):
            AutoModelForCausalLM.from_pretrained(copy)
    assert not (tmp_path / "exploded").exists()


def test_code_of_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        slimplus.load(copy)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_that_lacks_a_tensor(checkpoint: Path, tmp_path: Path) -> None:
    """Transformers would give it random values."""
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.scales"):
        copy = shutil.copytree(checkpoint, tmp_path / name)
        tensors = load_file(copy / WEIGHTS)
        del tensors[name]
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"lacks .*{name}"):
            slimplus.load(copy)


def test_values_are_checked_after_loading(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.group_index"][0] = 999
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    for load in (slimplus.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: group_index is not a permutation"):
            load(copy)


def test_a_tower_of_endless_blocks_is_refused() -> None:
    tower = {"model_type": "qwen2_5_vl", "vision_config": {"depth": 10**9}}
    with pytest.raises(ValueError, match=r"config\.json: depth: 1000000000 does not fit"):
        check_architecture(tower, ["model.language_model.layers.0.mlp.up_proj"])
    tower["vision_config"] = {"depth": 32}
    check_architecture(tower, ["model.language_model.layers.0.mlp.up_proj"])
