"""Finding the blocks and linear layers of a model."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from slimplus.models.architectures import (
    UnsupportedModelError,
    blocks_path,
    find_blocks,
    find_embedding_and_head,
    find_linears,
    following_norm,
    is_tied,
    left_out,
    packed_share,
    plain_linears,
)
from slimplus.models.loading import ModelSource, build_on_meta
from slimplus.models.shrink import shrink
from slimplus.utils.errors import InputError
from tests.support.models import ModelMaker


@pytest.mark.parametrize(("model_type", "count"), [("llama", 7), ("opt", 6)])
def test_linears_of_a_block(make_model: ModelMaker, model_type: str, count: int) -> None:
    model = build_on_meta(ModelSource(str(make_model(model_type))).config())
    assert model.device.type == "meta"
    blocks = find_blocks(model)
    assert len(blocks) == 2
    assert len(find_linears(blocks[0])) == count


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(InputError, match="'nothing' is no model_type"):
        ModelSource.config_of({"model_type": "nothing"})


def test_blocks_are_those_of_the_text_not_of_the_images() -> None:
    """Its vision tower has a list of blocks as well, of more parameters."""
    model = build_on_meta(AutoConfig.for_model("git"))
    assert blocks_path(model) == "git.encoder.layer"


def test_layers_that_multiply_as_linear_ones_do_become_such() -> None:
    """GPT-2 stores weights transposed; the view `[out, in]` shares their memory."""
    config = shrink(AutoConfig.for_model("gpt2"), 2)
    model = AutoModelForCausalLM.from_config(config)
    stored = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    layer = find_linears(find_blocks(plain_linears(model))[0])["mlp.c_fc"]
    assert layer.weight.shape == stored.shape[::-1]
    assert layer.weight.data_ptr() == stored.data_ptr()


def test_routers_gates_and_small_layers_stay_as_they_are() -> None:
    model = build_on_meta(AutoConfig.for_model("qwen3_next"))
    reasons = {name: reason for block in find_blocks(model) for name, reason in left_out(block).items()}
    assert reasons["mlp.shared_expert_gate.weight"] == "fewer than 32 rows"
    assert reasons["linear_attn.in_proj_ba.weight"] == "a projection to the few values that steer a recurrence"
    assert reasons["mlp.gate.weight"] == "a Qwen3NextTopKRouter, not a linear layer"
    assert packed_share(model) > 0.99


def test_experts_of_an_unknown_layout_stay_as_they_are() -> None:
    model = build_on_meta(AutoConfig.for_model("longcat_flash"))
    reasons = left_out(find_blocks(model)[0])
    assert (
        reasons["mlp.experts.down_proj"] == "a stack [512, 6144, 2048] of experts' weights, whose layout is not known"
    )
    assert packed_share(model) < 0.05


@pytest.mark.parametrize(
    ("model_type", "first", "last"),
    [("llama", "input_layernorm", "norm"), ("bloom", "input_layernorm", "ln_f"), ("opt", "self_attn_layer_norm", "")],
)
def test_the_norm_that_reads_a_block(model_type: str, first: str, last: str) -> None:
    model = build_on_meta(shrink(AutoConfig.for_model(model_type), 2))
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    assert names[id(following_norm(model, 0))] == first
    assert names[id(following_norm(model, 1))] == (last or "final_layer_norm")


def test_a_norm_behind_a_part_of_a_block_does_not_read_the_block_before() -> None:
    model = build_on_meta(shrink(AutoConfig.for_model("olmo2"), 2))
    with pytest.raises(UnsupportedModelError, match="no normalization follows block 0"):
        following_norm(model, 0)


def test_an_embedding_that_is_not_plain() -> None:
    class Scaled(nn.Embedding):
        pass

    model = build_on_meta(AutoConfig.for_model("qwen2", hidden_size=64, num_attention_heads=4, num_hidden_layers=1))
    assert not is_tied(model)
    model.set_input_embeddings(Scaled(16, 64))
    with pytest.raises(UnsupportedModelError, match="Scaled and Linear cannot be packed"):
        find_embedding_and_head(model)
