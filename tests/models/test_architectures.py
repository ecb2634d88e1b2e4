"""Finding the blocks and linear layers of a model."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoConfig

from slimplus.models.architectures import (
    BLOCKS,
    UnsupportedModelError,
    find_blocks,
    find_embedding_and_head,
    find_linears,
)
from slimplus.models.loading import ModelSource, build_on_meta
from slimplus.utils.errors import InputError
from tests.support.models import TINY, ModelMaker


def test_every_supported_architecture_is_tested() -> None:
    assert set(TINY) == set(BLOCKS)


@pytest.mark.parametrize(("model_type", "count"), [("llama", 7), ("opt", 6)])
def test_linears_of_a_block(make_model: ModelMaker, model_type: str, count: int) -> None:
    model = build_on_meta(ModelSource(str(make_model(model_type))).config())
    assert model.device.type == "meta"
    blocks = find_blocks(model)
    assert len(blocks) == 2
    assert len(find_linears(blocks[0])) == count


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(InputError, match="'gpt2' is not supported"):
        find_blocks(build_on_meta(ModelSource.config_of({"model_type": "gpt2"})))
    with pytest.raises(InputError, match="'nothing' is no model_type"):
        ModelSource.config_of({"model_type": "nothing"})


def test_an_embedding_that_is_not_plain() -> None:
    class Scaled(nn.Embedding):
        pass

    model = build_on_meta(AutoConfig.for_model("qwen2", hidden_size=64, num_attention_heads=4, num_hidden_layers=1))
    assert not find_embedding_and_head(model).tied
    model.set_input_embeddings(Scaled(16, 64))
    with pytest.raises(UnsupportedModelError, match="Scaled and Linear cannot be packed"):
        find_embedding_and_head(model)
