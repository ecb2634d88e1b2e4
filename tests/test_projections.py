"""How packed layers multiply: PyTorch's int4 operator on a CPU, Triton on a GPU, alone and fused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight, group_count, per_column, storable_scale, storable_zero_point
from slimplus.nn import PackedLinear
from slimplus.nn.backends.cpu_int4 import MAX_ROWS, Int4Weight, int4_linear
from slimplus.nn.fusion import FusedLinears, prepare_inference

TOLERANCE = 1e-2  # of the norm: bfloat16 has 8 bits, and rounds the weights' scales, the inputs and the outputs


def random_weight(
    out_features: int, in_features: int, group_size: int, widths: tuple[int, ...], seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(in_features, group_size)
    bits = torch.tensor(widths, dtype=torch.int32)[torch.randint(len(widths), (groups,), generator=generator)]
    levels = per_column(2**bits, group_size, in_features)
    integers = (torch.rand(out_features, in_features, generator=generator) * levels).to(torch.uint8)
    scale = storable_scale(torch.rand(out_features, groups, generator=generator) * 0.1 + 0.01)
    zero_point = storable_zero_point(torch.rand(out_features, groups, generator=generator) * 2**bits, bits)
    return QuantizedWeight(integers, scale, zero_point, bits, group_size)


class Attention(nn.Module):
    """Three layers of other sizes and widths on one input, one of them with a bias, and one on another input."""

    q_proj: PackedLinear
    k_proj: PackedLinear
    v_proj: PackedLinear
    o_proj: PackedLinear

    def __init__(self, group_size: int = 64, in_features: int = 200) -> None:
        super().__init__()
        rows = {"q_proj": 48, "k_proj": 20, "v_proj": 16, "o_proj": 37}
        for seed, (name, out_features) in enumerate(rows.items()):
            weight = random_weight(out_features, in_features, group_size, (1, 2, 3), seed)
            bias = (
                torch.randn(out_features, generator=torch.Generator().manual_seed(seed)) if name == "k_proj" else None
            )
            self.add_module(name, PackedLinear.from_quantized(weight, bias))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(inputs), self.k_proj(inputs), self.v_proj(inputs)


def inputs_of(rows: int, columns: int = 200, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(9)).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@given(
    group_size=st.sampled_from([32, 64, 96, 128, 512]),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 700),
    rows=st.integers(1, 5),
    widths=st.sets(st.integers(1, 4), min_size=1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_int4_is_as_exact_as_bfloat16(
    group_size: int, out_features: int, in_features: int, rows: int, widths: set[int], seed: int
) -> None:
    weights = [random_weight(out_features + extra, in_features, group_size, tuple(widths), seed) for extra in (0, 3)]
    inputs = inputs_of(rows, in_features)
    found = Int4Weight.from_quantized(weights).linear(inputs)
    expected = inputs.double() @ torch.cat([weight.dequantize() for weight in weights]).double().T
    assert found.dtype == inputs.dtype
    # A product may cancel to nothing, and a level too: what is rounded is a level and, at 4 bits, where all integers
    # are taken and the grid cannot be moved to its zero point, up to 8 steps.
    rounded = [weight.dequantize().abs() + 4 * per_column(weight.scale, group_size, in_features) for weight in weights]
    assert (
        (found - expected).abs() <= TOLERANCE * (inputs.double().abs() @ torch.cat(rounded).double().T) + 1e-9
    ).all()


def test_fused_layers_give_what_each_gives() -> None:
    module, inputs = Attention(), inputs_of(3)
    layers = (module.q_proj, module.k_proj, module.v_proj)
    exact = [inputs.double() @ layer.dequantize().double().T for layer in layers]
    assert module.k_proj.bias is not None
    exact[1] += module.k_proj.bias.double()
    assert [len(group.layers) for group in prepare_inference(module, fuse=False)] == [1, 1, 1, 1]
    alone = module(inputs)
    assert sorted(len(group.layers) for group in prepare_inference(module)) == [1, 3]
    fused = module(inputs)
    for one, other, expected in zip(fused, alone, exact, strict=True):
        assert torch.equal(one, other)
        assert relative_error(one, expected) < TOLERANCE


def test_fused_layers_are_called_in_any_order_and_on_other_inputs() -> None:
    module = Attention()
    first, second = inputs_of(3), inputs_of(4)
    prepare_inference(module, fuse=False)
    q, k, v = module(first)
    other = module.k_proj(second)
    prepare_inference(module)
    assert torch.equal(module.v_proj(first), v)
    assert torch.equal(module.q_proj(first), q)
    assert torch.equal(module.k_proj(second), other)  # not the part of `first` that is waiting
    assert torch.equal(module.k_proj(first), k)
    assert torch.equal(module.k_proj(first), k)
    first.copy_(inputs_of(3) * 2)  # the same tensor with other content, after all have had their part
    assert torch.equal(module.q_proj(first), module.q_proj(first.clone()))


def test_layers_of_other_sizes_are_not_fused() -> None:
    module = Attention()
    module.v_proj = PackedLinear.from_quantized(random_weight(16, 264, 64, (2,)), None)
    assert [len(group.layers) for group in prepare_inference(module)] == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40, MAX_ROWS])
def test_every_way_gives_the_exact_product(dtype: torch.dtype, rows: int) -> None:
    inputs = inputs_of(rows, dtype=dtype)
    for keep_dense in (False, True):
        module = Attention()
        prepare_inference(module, keep_dense=keep_dense)
        layer = module.o_proj
        expected = inputs.double() @ layer.dequantize().double().T
        found = layer(inputs)
        assert found.dtype == dtype
        assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else TOLERANCE)
        assert torch.equal(layer(inputs), found)
        assert layer(inputs[0, 0]).shape == (layer.out_features,)
        dense_used = dtype == torch.float32 or rows >= 32
        assert (layer._dense is not None) == (keep_dense and dense_used)


def test_autocast_decides_the_dtype() -> None:
    module, inputs = Attention(), inputs_of(2, dtype=torch.float32)
    expected = inputs.double() @ module.q_proj.dequantize().double().T
    prepare_inference(module)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.q_proj(inputs)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < TOLERANCE


def test_gradients_are_refused_in_words() -> None:
    module = Attention()
    for prepared in (False, True):
        if prepared:
            prepare_inference(module)
        output = module.q_proj(inputs_of(2).requires_grad_())  # a forward outside no_grad is no error
        with pytest.raises(RuntimeError, match="for inference only.*inference_mode"):
            output.sum().backward()


def test_a_forward_with_gradients_keeps_no_dequantized_weight() -> None:
    """They are as much memory as the model took before it was quantized."""
    module, saved = Attention(), list[torch.Size]()

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.o_proj(inputs_of(2).requires_grad_())
    assert module.o_proj.shape not in saved
    prepare_inference(module, keep_dense=True)
    with torch.inference_mode():
        module.o_proj(inputs_of(40))
    module.o_proj(inputs_of(40).requires_grad_())  # with a weight that was kept where gradients cannot be recorded


def test_a_second_preparation_frees_kept_weights() -> None:
    module = Attention()
    prepare_inference(module, keep_dense=True)
    module.o_proj(inputs_of(40))
    assert module.o_proj._dense is not None
    prepare_inference(module)
    assert module.o_proj._dense is None


@pytest.mark.parametrize("columns", [150, 300])
def test_inputs_of_another_width_are_refused(columns: int) -> None:
    module = Attention()
    prepare_inference(module)
    with pytest.raises(ValueError, match=f"the inputs have {columns} columns, and this layer takes 200"):
        module.o_proj(torch.zeros(3, columns, dtype=torch.bfloat16))


def test_float64_is_exact() -> None:
    module, inputs = Attention(), inputs_of(2, dtype=torch.float64)
    prepare_inference(module)
    torch.testing.assert_close(module.o_proj(inputs), inputs @ module.o_proj.dequantize(torch.float64).T)


def test_the_state_dict_and_copies_know_nothing_of_it() -> None:
    module, inputs = Attention(), inputs_of(2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    prepare_inference(module)
    expected = module(inputs)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    twin = copy.deepcopy(module)
    assert isinstance(twin.q_proj.fused, FusedLinears)
    assert twin.q_proj.fused.layers[0] is twin.q_proj
    assert all(torch.equal(one, other) for one, other in zip(twin(inputs), expected, strict=True))


def test_a_cast_of_the_model_leaves_the_packed_tensors() -> None:
    module, inputs = Attention(), inputs_of(2)
    prepare_inference(module)
    expected = module(inputs)
    dtypes = {name: buffer.dtype for name, buffer in module.named_buffers()}
    module.to(torch.bfloat16).float().half()
    assert {name: buffer.dtype for name, buffer in module.named_buffers()} == dtypes
    assert module.k_proj.bias is not None
    assert module.k_proj.bias.dtype == torch.float16
    assert torch.equal(module(inputs)[0], expected[0])


def test_other_weights_are_seen_after_a_cast_or_a_load() -> None:
    module, inputs = Attention(), inputs_of(2)
    prepare_inference(module)
    before = module(inputs)[0]
    state = module.state_dict()
    state["q_proj.scales"] = state["q_proj.scales"] * 2
    module.load_state_dict(state)
    assert torch.equal(module(inputs)[0], before * 2)


@pytest.mark.filterwarnings("ignore")
def test_compiled_as_one_graph() -> None:
    module = Attention()
    for projections in prepare_inference(module):
        projections.prepare()
    with torch.inference_mode():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for rows in (1, 3, 50, MAX_ROWS):
            expected = module(inputs_of(rows))
            assert all(torch.equal(a, b) for a, b in zip(compiled(inputs_of(rows)), expected, strict=True))


def test_the_operators_are_registered_soundly() -> None:
    weight = Int4Weight.from_quantized([random_weight(20, 100, 32, (1, 4))])
    arguments = (inputs_of(2, 100), weight.int4, weight.scales_and_zeros, None, weight.group_size, weight.out_features)
    torch.library.opcheck(int4_linear, arguments)
    layer = Attention().o_proj
    tensors = list(layer.packed_tensors().values())
    widths, counts = list(layer.bit_counts), list(layer.bit_counts.values())
    opcheck_arguments = (
        tensors,
        widths,
        counts,
        layer.out_features,
        layer.in_features,
        layer.group_size,
        torch.float32,
    )
    torch.library.opcheck(torch.ops.slimplus.dequantize.default, opcheck_arguments)


INTERPRETED = """
import torch
from slimplus.nn import PackedLinear
from slimplus.nn.backends.triton import packed_matmul
from slimplus.nn.fusion import triton_weight
from tests.test_projections import Attention, inputs_of, relative_error

for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
    module = Attention()
    layers = [module.q_proj, module.k_proj, module.v_proj]
    exact = [layer.dequantize().double() for layer in layers]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    shards = triton_weight(layers)
    for rows in (1, 20):
        inputs = inputs_of(rows, dtype=dtype)
        parts = shards.linear(inputs).split(shards.out_features, dim=-1)
        for part, weight, layer in zip(parts, exact, layers, strict=True):
            expected = inputs.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
            assert relative_error(part, expected) < tolerance, (dtype, rows)
    shards.warm_up(dtype)
    assert not shards.counters.any()
    # The layers still hold their packed tensors, now as parts of the fused ones.
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    storages = {layer.qplane2.untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == 1

arguments = (inputs_of(2)[0].half(), shards.tensors, shards.counters, None, shards.in_features, shards.group_size,
             shards.out_features, shards.widths)
torch.library.opcheck(packed_matmul, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_the_triton_form_under_the_interpreter() -> None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},  # read when Triton is imported
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_projections_know_what_they_take() -> None:
    group = FusedLinears([PackedLinear.from_quantized(random_weight(16, 64, 16, (2,)), None)])
    assert not group.supports(torch.bfloat16, 1)  # the operator has no groups of 16
    group = FusedLinears([PackedLinear.from_quantized(random_weight(16, 64, 32, (2,)), None)])
    assert group.supports(torch.bfloat16, 1)
    assert not group.supports(torch.float32, 1)
    assert not group.supports(torch.bfloat16, 0)
    assert not group.supports(torch.bfloat16, MAX_ROWS)
