"""Packed layers multiplied by the Triton kernels, under the interpreter."""

from __future__ import annotations

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
