"""How the vLLM plugin loads and multiplies packed weights, against stand-ins; `make test-vllm` runs vLLM itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slimplus.nn import prepare_inference
from tests.support.vllm_stand_ins import (
    COLUMNS,
    LinearBase,
    ParallelLMHead,
    VocabParallelEmbedding,
    attention,
    fused_attention,
    load_attention,
    outputs,
    packed_layer,
    quantization,
)


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 500])
def test_the_fused_layer_computes_what_the_separate_ones_do(
    plugin: Any, dtype: torch.dtype, rows: int, scale_bits: int
) -> None:
    """Few rows of bfloat16 are multiplied by int4, the others by dequantized weights."""
    separate = attention(scale_bits)
    fused = fused_attention(plugin, separate)
    load_attention(fused, separate)
    prepare_inference(separate)
    inputs = torch.randn(rows, COLUMNS, dtype=dtype)
    expected = outputs(separate, inputs)
    assert torch.equal(fused(inputs), expected)
    fused.bias = nn.Parameter(torch.randn(expected.shape[1], dtype=dtype), requires_grad=False)
    assert torch.equal(fused(inputs), expected + fused.bias)


def test_shards_with_numbers_and_layers_alone(plugin: Any) -> None:
    layers = {
        "mlp.gate_proj": packed_layer(96, (2, 1, 3), 5),
        "mlp.up_proj": packed_layer(96, (2, 2, 2), 6),
        "mlp.down_proj": packed_layer(192, (3, 1), 7, columns=96),
    }
    config = plugin.PackedConfig.from_config(quantization(layers))
    config.packed_modules_mapping["gate_up_proj"] = ["gate_proj", "up_proj"]
    gate_up = LinearBase(config, "mlp.gate_up_proj", COLUMNS, [96, 96])
    down = LinearBase(config, "mlp.down_proj", 96, [192])
    for shard, name in enumerate(["mlp.gate_proj", "mlp.up_proj"]):
        for key, tensor in layers[name].named_buffers():
            gate_up.load(key, tensor, shard)
    for key, tensor in layers["mlp.down_proj"].named_buffers():
        down.load(key, tensor)  # vLLM gives no shard where there is but one
    for layer in (gate_up, down):
        layer.quant_method.process_weights_after_loading(layer)
    inputs = torch.randn(3, COLUMNS)
    assert torch.equal(gate_up(inputs), torch.cat([layers[f"mlp.{n}_proj"](inputs) for n in ("gate", "up")], dim=-1))
    assert torch.equal(down(inputs[:, :96]), layers["mlp.down_proj"](inputs[:, :96]))


def test_nothing_is_held_twice(plugin: Any) -> None:
    separate = attention()
    fused = fused_attention(plugin, separate)
    assert sum(parameter.nbytes for parameter in fused.parameters()) == 0
    load_attention(fused, separate)
    assert not list(fused.parameters())
    assert sum(tensor.nbytes for tensor in fused.buffers()) == sum(tensor.nbytes for tensor in separate.buffers())


def test_the_compiler_does_not_see_how_many_rows_go_which_way(plugin: Any) -> None:
    separate = attention()
    fused = fused_attention(plugin, separate)
    load_attention(fused, separate)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 7, 500):
        inputs = torch.randn(rows, COLUMNS, dtype=torch.bfloat16)
        with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile" if rows > 2 else "default"):
            assert torch.equal(compiled(inputs), fused(inputs))
    torch.library.opcheck(torch.ops.slimplus.vllm_linear, (inputs, "slimplus:model.layers.0.self_attn.q_proj", 120))


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_ranks_share_the_rows_of_q_k_and_v(plugin: Any, scale_bits: int) -> None:
    """Two ranks for each of the heads of k and v: both keep the same rows of these."""
    separate = attention(scale_bits)
    whole = [layer.dequantize() for layer in separate.children()]  # type: ignore[operator] # a packed layer
    inputs = torch.randn(3, COLUMNS)
    for rank in range(4):
        fused = fused_attention(plugin, separate, ranks=4, rank=rank, replicas=2)
        load_attention(fused, separate)
        q, k, v = (len(weight) // shards for weight, shards in zip(whole, (4, 2, 2), strict=True))
        pair = rank // 2
        own = [whole[0][rank * q :][:q], whole[1][pair * k :][:k], whole[2][pair * v :][:v]]
        assert torch.equal(fused(inputs), torch.cat([inputs @ weight.T for weight in own], dim=-1))


def test_ranks_share_the_rows_of_a_layer_that_the_checkpoint_has_fused(plugin: Any) -> None:
    fused = packed_layer(64 + 32 + 32, (2, 1, 3), 0)
    config = plugin.PackedConfig.from_config(quantization({"attn.qkv_proj": fused}))
    for rank in range(4):
        own: Any = LinearBase(config, "attn.qkv_proj", COLUMNS, [64, 32, 32], 4, rank, replicas=2)
        for name, tensor in fused.named_buffers():
            own.load(name, tensor)
        own.quant_method.process_weights_after_loading(own)
        q, k, v = fused.dequantize().split([64, 32, 32])
        weight = torch.cat([q[rank * 16 :][:16], k[rank // 2 * 16 :][:16], v[rank // 2 * 16 :][:16]])
        assert torch.equal(own.packed.layers[0].dequantize(), weight)


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_ranks_share_columns_and_cut_groups(plugin: Any, scale_bits: int) -> None:
    layer = packed_layer(40, (2, 1, 3), 0, scale_bits=scale_bits)
    config = plugin.PackedConfig.from_config(quantization({"mlp.down_proj": layer}))
    inputs = torch.randn(3, COLUMNS)
    for rank in range(2):
        own = LinearBase(config, "mlp.down_proj", COLUMNS, [40], 2, rank, by_columns=True)
        for name, tensor in layer.named_buffers():
            own.load(name, tensor)
        own.quant_method.process_weights_after_loading(own)
        columns = slice(rank * 96, (rank + 1) * 96)  # groups have 64
        assert torch.equal(own(inputs[:, columns]), inputs[:, columns] @ layer.dequantize()[:, columns].T)


def test_ranks_that_cannot_share_a_layer_are_told(plugin: Any) -> None:
    layer = packed_layer(40, (2, 1, 3), 0)
    config = plugin.PackedConfig.from_config(quantization({"mlp.down_proj": layer}))
    own = LinearBase(config, "mlp.down_proj", COLUMNS, [40], 8, 0, by_columns=True)
    *others, (name, last) = layer.named_buffers()
    for other, tensor in others:
        own.load(other, tensor)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: columns 0 to 23 cut .* another --tensor-parallel-size"):
        own.load(name, last)
    with pytest.raises(ValueError, match=r"vLLM wants \[15\] rows on each of 2 ranks, which the checkpoint's \[40\]"):
        LinearBase(config, "mlp.down_proj", COLUMNS, [30], 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_embedding_with_an_empty_prefix_looks_up_and_multiplies(plugin: Any, ranks: int) -> None:
    plugin.described.tie_word_embeddings = True
    packed = packed_layer(100, (4, 8, 4), 0)
    block = packed_layer(16, (2, 2, 2), 1)
    config = plugin.PackedConfig.from_config(
        quantization({"model.embed_tokens": packed, "model.layers.0.mlp.up_proj": block})
    )
    inputs, weight = torch.randn(3, COLUMNS), packed.dequantize()
    logits, rows = [], []
    for rank in range(ranks):
        LinearBase(config, "model.layers.0.mlp.up_proj", COLUMNS, [16])
        embedding = VocabParallelEmbedding(config, "", 100, COLUMNS, ranks, rank)
        head = ParallelLMHead(config, ".lm_head", 100, COLUMNS, ranks, rank)
        assert isinstance(head.quant_method, plugin.TiedHeadMethod)
        assert head.quant_method.tie_weights(head, embedding) is embedding
        assert embedding.bias is None
        for name, tensor in packed.named_buffers():
            embedding.load(name, tensor)
        method = embedding.quant_method
        method.process_weights_after_loading(embedding)
        indices = embedding.shard_indices
        own = torch.arange(indices.org_vocab_end_index - indices.org_vocab_start_index)
        rows.append(method.embedding(embedding, own))
        logits.append(method.apply(embedding, inputs))
        assert logits[-1].shape[-1] == 128 // ranks
    assert torch.equal(torch.cat(rows), weight)
    assert torch.equal(torch.cat(logits, dim=-1)[:, :100], inputs @ weight.T)
    assert config.get_checkpoint_weight_mapper() == "the mapper"


def test_a_tensor_that_does_not_fit_is_named(plugin: Any) -> None:
    separate = attention()
    fused = fused_attention(plugin, separate)
    scales = separate.get_submodule("k_proj").get_buffer("scales")
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.scales: config.json asks for \(3, 32\), .* \(2, 32\)"):
        fused.load("scales", scales[:2], "k")
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.qplane1: config.json asks for None"):
        fused.load("qplane1", torch.zeros(4, 32, dtype=torch.int16), "k")  # it has groups of 2 bits alone


def test_a_tensor_that_the_checkpoint_lacks_is_named(plugin: Any) -> None:
    fused = fused_attention(plugin, attention())
    with pytest.raises(ValueError, match=r"the checkpoint lacks model\.layers\.0\.self_attn\.q_proj\.qplane1"):
        fused.quant_method.process_weights_after_loading(fused)
