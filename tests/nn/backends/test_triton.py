"""Packed layers multiplied by the Triton kernels, under the interpreter."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from slimplus.nn.backends.triton import TritonWeight
from tests.support.processes import run_code

INTERPRETED = """
import torch
from slimplus.nn import PackedLinear
from slimplus.nn.backends.triton import packed_matmul
from slimplus.nn.fusion import triton_weight
from tests.support.layers import Attention, inputs_of, relative_error

for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
    module = Attention()
    layers = [module.q_proj, module.k_proj, module.v_proj]
    exact = [layer.dequantize().double() for layer in layers]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fused = triton_weight(layers)
    for rows in (1, 20):
        inputs = inputs_of(rows, dtype=dtype)
        parts = fused.linear(inputs).split(fused.out_features, dim=-1)
        for part, weight, layer in zip(parts, exact, layers, strict=True):
            expected = inputs.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
            assert relative_error(part, expected) < tolerance, (dtype, rows)
    fused.warm_up(dtype)
    assert not fused.counters.any()
    # The layers still hold their packed tensors, now as parts of the fused ones.
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    storages = {layer.qplane2.untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == 1

arguments = (inputs_of(2)[0].half(), fused.tensors, fused.counters, None, fused.in_features, fused.group_size,
             fused.out_features, fused.widths)
torch.library.opcheck(packed_matmul, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_the_triton_backend_under_the_interpreter() -> None:
    run_code(INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    ("stream", "capturing", "own"), [("default", False, True), ("side", False, False), ("side", True, True)]
)
def test_launches_on_other_streams_count_for_themselves(
    monkeypatch: pytest.MonkeyPatch, stream: str, capturing: bool, own: bool
) -> None:
    counters = SimpleNamespace(device=torch.device("cuda", 0))
    fresh = torch.zeros(3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch, "zeros_like", lambda tensor: fresh)
    weight = TritonWeight([], cast("Tensor", counters), 64, 32, [16], [2], None)
    assert weight._idle_counters() is (counters if own else fresh)


@pytest.mark.parametrize("collecting", [True, False])
def test_nothing_is_collected_while_a_graph_is_captured(collecting: bool) -> None:
    pytest.importorskip("triton")
    from slimplus.kernels.measure import without_collection

    before = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if before else gc.disable)()
