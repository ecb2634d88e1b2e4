"""How packed layers wider than 4 bits, and heads tied to an embedding, multiply on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_projections import TOLERANCE, inputs_of, random_weight, relative_error
from torch import nn

from slimplus.format.affine import per_column
from slimplus.nn import PackedEmbedding, PackedLinear, TiedHead, prepare_inference
from slimplus.nn.backends.cpu_int4 import Int4Weight
from slimplus.nn.backends.cpu_int8 import MAX_ROWS, Int8Weight, int8_linear


@given(
    group_size=st.sampled_from([32, 64, 96, 128, 512]),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 700),
    rows=st.integers(1, 5),
    widths=st.sets(st.integers(1, 8), min_size=1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
@example(group_size=32, out_features=32, in_features=1, rows=2, widths={1}, seed=1098)
def test_int8_is_as_exact_as_bfloat16(
    group_size: int, out_features: int, in_features: int, rows: int, widths: set[int], seed: int
) -> None:
    weights = [random_weight(out_features + extra, in_features, group_size, tuple(widths), seed) for extra in (0, 3)]
    inputs = inputs_of(rows, in_features)
    bias = torch.arange(2 * out_features + 3.0)
    found = Int8Weight.from_quantized(weights, bias).linear(inputs)
    expected = inputs.double() @ torch.cat([weight.dequantize() for weight in weights]).double().T + bias
    assert found.dtype == inputs.dtype
    # What is rounded is the distance from the grid's centre, up to half of it wherever the zero point lies.
    rounded = [
        weight.dequantize().abs() + per_column(weight.scale * 2.0 ** (weight.bits - 1), group_size, in_features)
        for weight in weights
    ]
    largest = inputs.double().abs() @ torch.cat(rounded).double().T + bias
    assert ((found - expected).abs() <= TOLERANCE * largest + 1e-9).all()


@pytest.mark.parametrize(
    ("widths", "form"), [((2, 4), Int4Weight), ((2, 5), Int8Weight), ((8,), Int8Weight)], ids=["4", "5", "8"]
)
def test_the_widths_decide_the_form(widths: tuple[int, ...], form: type) -> None:
    layer = PackedLinear.from_quantized(random_weight(24, 256, 32, widths), torch.randn(24))
    module = nn.Sequential(layer)
    inputs = inputs_of(2, 256)
    exact = nn.functional.linear(inputs.double(), layer.dequantize().double(), layer.bias.double())  # type: ignore[union-attr]
    (projections,) = prepare_inference(module)
    assert relative_error(module(inputs), exact) < TOLERANCE
    assert type(projections._backend) is form
    many = inputs_of(MAX_ROWS + 400, 256)
    assert torch.equal(module(many), nn.functional.linear(many, layer.dequantize(many.dtype), layer.bias.bfloat16()))  # type: ignore[union-attr]
    assert layer(inputs[0, 0]).shape == (24,)
    assert not projections.supports(torch.float32, 1)
    assert not projections.supports(torch.bfloat16, 0)


def test_the_operator_is_registered_soundly() -> None:
    weight = Int8Weight.from_quantized([random_weight(20, 100, 32, (6, 8))])
    arguments = (inputs_of(2, 100), weight.int8, weight.scales, weight.offsets, torch.ones(20))
    torch.library.opcheck(int8_linear, arguments)


class Tied(nn.Module):
    """An embedding and the head tied to it."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.embedding = PackedEmbedding.from_quantized(random_weight(40, 200, 64, (bits,)), torch.bfloat16)
        self.head = TiedHead(self.embedding)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_multiplies_like_any_packed_layer(bits: int) -> None:
    module, inputs = Tied(bits), inputs_of(3)
    exact = inputs.double() @ module.embedding.dequantize().double().T
    (projections,) = prepare_inference(module)
    assert relative_error(module.head(inputs), exact) < TOLERANCE
    assert isinstance(projections._backend, Int4Weight if bits == 4 else Int8Weight)
    assert not any(name.startswith("head") for name in module.state_dict())
    other = copy.deepcopy(module)
    assert other.head._embedding[0] is other.embedding
    other.embedding.scales.mul_(2)
    assert torch.equal(module.head(inputs.float()), inputs.float() @ module.embedding.dequantize().T)
    assert torch.equal(other.head(inputs.float()), inputs.float() @ other.embedding.dequantize().T)


def test_a_tied_head_whose_tensors_are_moved_moves_those_of_the_embedding() -> None:
    module = Tied(8)
    tokens = torch.arange(5)
    before = module.embedding(tokens)
    moved = {name: tensor.clone() for name, tensor in module.head.packed_tensors().items()}
    module.head.replace_tensors(moved)
    assert module.embedding.scales is moved["scales"]
    assert module.head.scales is moved["scales"]
    assert torch.equal(module.embedding(tokens), before)


def test_embedding_and_tied_head_compile_as_one_graph() -> None:
    module, tokens = Tied(8), torch.arange(6).view(2, 3)
    prepare_inference(module)

    def forward(asked: torch.Tensor) -> torch.Tensor:
        return module.head(module.embedding(asked))

    with torch.no_grad():
        expected = forward(tokens)
        compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(tokens), expected)
