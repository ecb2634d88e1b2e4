"""What the vLLM plugin takes and refuses, against stand-ins; `make test-vllm` runs vLLM itself."""

from __future__ import annotations

import tomllib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.processes import ROOT
from tests.support.vllm_stand_ins import (
    COLUMNS,
    LinearBase,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    packed_layer,
    quantization,
)


def test_a_packed_embedding_that_vllm_does_not_ask_for_is_named(plugin: Any) -> None:
    layers = {
        "model.embed_tokens": packed_layer(100, (4, 8, 4), 0),
        "model.layers.0.up": packed_layer(16, (2, 2, 2), 1),
    }
    config = plugin.PackedConfig.from_config(quantization(layers))
    with pytest.raises(ValueError, match=r"model\.embed_tokens: vLLM's model .* not take it packed; quantize with"):
        config.get_checkpoint_weight_mapper()


def test_what_vllm_cannot_serve_is_named(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"mlp\.experts\.up_proj\.0: vLLM takes no packed experts; serve what"):
        plugin.PackedConfig.from_config(quantization({"mlp.experts.up_proj.0": packed_layer(16, (2, 2, 2), 0)}))
    plugin.described.model_type = "bloom"
    config = plugin.PackedConfig.from_config(quantization({"h.0.query_key_value": packed_layer(48, (2, 2, 2), 0)}))
    with pytest.raises(ValueError, match=r"h\.0\.query_key_value: vLLM's bloom reorders rows"):
        LinearBase(config, "h.0.query_key_value", COLUMNS, [48])


def test_only_what_the_checkpoint_packs_is_taken(plugin: Any) -> None:
    layers = {f"a.{name}": packed_layer(16, (2, 2, 2), 0) for name in ("q_proj", "k_proj")}
    config = plugin.PackedConfig.from_config(quantization(layers))
    config.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
    linear = LinearBase.__new__(LinearBase)
    assert isinstance(config.get_quant_method(linear, "a.q_proj"), plugin.PackedLinearMethod)
    assert isinstance(config.get_quant_method(linear, "other.o_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Module(), "a.attn") is None
    assert VocabParallelEmbedding(config, "", 100, COLUMNS).quant_method is None
    with pytest.raises(ValueError, match=r"of a\.q_proj, a\.k_proj, a\.v_proj only a\.q_proj, a\.k_proj is packed"):
        config.get_quant_method(linear, "a.qkv_proj")


def test_a_model_may_name_its_layers_otherwise(plugin: Any) -> None:
    config = plugin.PackedConfig.from_config(quantization({"model.q_proj": packed_layer(16, (2, 2, 2), 0)}))
    config.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda d: {f"language_{name}": v for name, v in d.items()}))
    assert list(config.layers) == ["language_model.q_proj"]


def test_the_entry_point_registers_once(plugin: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["vllm.general_plugins"]["slimplus"]
    assert target == f"{plugin.register.__module__}:{plugin.register.__name__}"
    plugin.register()
    plugin.register()  # vLLM calls it in each process, and sometimes twice
    assert plugin.methods == {"slimplus": plugin.PackedConfig}
    config = plugin.PackedConfig({})
    assert config.get_name() == "slimplus"
    assert torch.bfloat16 in config.get_supported_act_dtypes()
