"""The plugin within SGLang's own layers; skipped where SGLang cannot be imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimplus.nn import PackedLinear
from tests.support.vllm_stand_ins import COLUMNS, packed_layer, quantization

linear = pytest.importorskip("sglang.srt.layers.linear", reason="needs SGLang, which is not installed here")
HEAD = 16


def layers_of(**rows: int) -> dict[str, PackedLinear]:
    return {
        f"model.layers.0.x.{name}": packed_layer(count, (2, 1, 3), seed)
        for seed, (name, count) in enumerate(rows.items())
    }


def config_of(layers: dict[str, PackedLinear]) -> Any:
    from sglang.srt.layers.quantization import get_quantization_config
    from sglang.srt.plugins import load_plugins

    from slimplus.hub.sglang import register

    load_plugins()
    register()  # where slimplus is not installed but lies in the path, it has no entry point
    return get_quantization_config("slimplus").from_config(quantization(layers))


def load(layer: nn.Module, sources: Mapping[str, PackedLinear], shards: tuple[int | str, ...] | None = None) -> None:
    for index, source in enumerate(sources.values()):
        for name, tensor in source.named_buffers():
            parameter: Any = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *([shards[index]] if shards else []))
    layer.quant_method.process_weights_after_loading(layer)  # type: ignore[operator, union-attr]


def build(kind: str, config: Any, rank: int, ranks: int) -> nn.Module:
    """One of SGLang's layers as `rank` of `ranks` makes it."""
    from sglang.srt.runtime_context import get_parallel

    common = {"bias": False, "quant_config": config, "params_dtype": torch.float32}
    path = "model.layers.0.x."
    with get_parallel().override(tp_rank=rank, tp_size=ranks, tp_group=None):
        if kind == "qkv":
            return linear.QKVParallelLinear(COLUMNS, HEAD, 4, 2, prefix=f"{path}qkv_proj", **common)
        if kind == "merged":
            return linear.MergedColumnParallelLinear(COLUMNS, [96, 96], prefix=f"{path}gate_up_proj", **common)
        if kind == "column":
            return linear.ColumnParallelLinear(COLUMNS, 96, prefix=f"{path}own", **common)
        return linear.RowParallelLinear(COLUMNS, 96, prefix=f"{path}own", reduce_results=False, **common)


KINDS = {
    "qkv": ({"q_proj": 4 * HEAD, "k_proj": 2 * HEAD, "v_proj": 2 * HEAD}, ("q", "k", "v")),
    "merged": ({"gate_proj": 96, "up_proj": 96}, (0, 1)),
    "column": ({"own": 96}, None),
    "row": ({"own": 96}, None),
}


def output(layer: nn.Module, inputs: Tensor) -> Tensor:
    from sglang.srt.runtime_context import get_parallel

    with get_parallel().override(tp_group=None):
        found: Tensor = layer(inputs)[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_sglang_computes_what_the_packed_layers_do(kind: str) -> None:
    rows, shards = KINDS[kind]
    sources = layers_of(**rows)
    layer = build(kind, config_of(sources), 0, 1)
    load(layer, sources, shards)
    inputs = torch.randn(3, COLUMNS)
    assert torch.equal(output(layer, inputs), torch.cat([source(inputs) for source in sources.values()], dim=-1))


@pytest.mark.parametrize("kind", ["qkv", "merged", "column"])
def test_two_ranks_share_out_the_rows(kind: str) -> None:
    rows, shards = KINDS[kind]
    sources = layers_of(**rows)
    inputs = torch.randn(3, COLUMNS)
    for rank in range(2):
        layer = build(kind, config_of(sources), rank, 2)
        load(layer, sources, shards)
        expected = [source(inputs).chunk(2, dim=-1)[rank] for source in sources.values()]
        torch.testing.assert_close(output(layer, inputs), torch.cat(expected, dim=-1))


def test_two_ranks_share_out_the_columns() -> None:
    sources = layers_of(own=96)
    inputs = torch.randn(3, COLUMNS)
    total = torch.zeros(3, 96)
    for rank in range(2):
        layer = build("row", config_of(sources), rank, 2)
        load(layer, sources)
        total += output(layer, inputs.chunk(2, dim=-1)[rank])
    torch.testing.assert_close(total, sources["model.layers.0.x.own"](inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head", "lm_head: SGLang takes no packed embedding or head"),
        ("model.layers.0.mlp.experts.3", "SGLang takes no packed experts"),
    ],
)
def test_what_sglang_cannot_take_packed_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of({name: packed_layer(96, (2, 1, 3), 0)})


def test_a_fused_layer_that_is_packed_in_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only model\.layers\.0\.x\.gate_proj is packed"):
        build("merged", config_of(layers_of(gate_proj=96)), 0, 1)
