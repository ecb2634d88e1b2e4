"""How packed layers multiply, alone and fused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from slimplus.nn import PackedLinear
from slimplus.nn.backends.cpu_int4 import MAX_ROWS, Int4Weight, int4_linear
from slimplus.nn.fusion import FusedLinears, prepare_inference
from tests.support.layers import TOLERANCE, Attention, inputs_of, random_weight, relative_error


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


@pytest.mark.parametrize("prepared", [False, True])
def test_inputs_get_the_gradient_of_an_ordinary_layer(prepared: bool) -> None:
    module, inputs = Attention(), inputs_of(2).requires_grad_()
    if prepared:
        prepare_inference(module)
    outputs = module(inputs)
    (found,) = torch.autograd.grad([output.sum() for output in outputs], inputs)
    weights = [layer.dequantize(torch.bfloat16) for layer in (module.q_proj, module.k_proj, module.v_proj)]
    expected = sum((weight.double().sum(0) for weight in weights), torch.zeros(200).double()).expand(1, 2, -1)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < TOLERANCE
    outputs[0].add_(1)  # autograd would refuse it for a view


def test_gradients_of_the_inputs_are_exact_in_float32() -> None:
    layer = Attention().k_proj
    inputs = inputs_of(3, dtype=torch.float32).requires_grad_()
    torch.autograd.gradcheck(lambda x: layer(x.float()).double(), inputs.double(), eps=1e-3, atol=1e-3)
    expected = torch.autograd.grad(layer.to_linear()(inputs).square().sum(), inputs)[0]
    assert torch.equal(torch.autograd.grad(layer(inputs).square().sum(), inputs)[0], expected)


def test_autocast_gives_gradients_in_the_dtype_of_the_inputs() -> None:
    layer, inputs = Attention().q_proj, inputs_of(2, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs)
    assert outputs.dtype == torch.bfloat16
    assert torch.autograd.grad(outputs.sum(), inputs)[0].dtype == torch.float32


def test_a_bias_can_be_trained() -> None:
    module = Attention()
    prepare_inference(module)
    module.k_proj(inputs_of(2))
    assert module.k_proj.bias is not None
    module.k_proj.bias.requires_grad_()
    module.k_proj(inputs_of(2)).sum().backward()
    assert torch.equal(module.k_proj.bias.grad, torch.full((20,), 2.0))  # type: ignore[arg-type]
    with torch.no_grad():
        module.k_proj.bias.add_(100)
    module.k_proj.bias.requires_grad_(False)
    assert (module.k_proj(inputs_of(2)) > 50).all()  # no backend has kept the bias of before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_rows_gives_one_without_rows(dtype: torch.dtype) -> None:
    module = Attention()
    prepare_inference(module)
    for output, rows in zip(module(torch.empty(0, 5, 200, dtype=dtype)), (48, 20, 16), strict=True):
        assert output.shape == (0, 5, rows)
        assert output.dtype == dtype


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
    with pytest.raises(ValueError, match=f"the inputs have {columns} columns, but this layer takes 200"):
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
