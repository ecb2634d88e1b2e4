"""Layers that learn their grid over packed integers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from slimplus.distributed.ranks import Ranks
from slimplus.format.affine import QuantizedWeight, choose_qparams, quantize, storable_scale
from slimplus.format.planes import pack
from slimplus.nn import FakeQuantizedLinear, PackedGridLinear, PackedLinear, PackedScaledLinear
from slimplus.nn.fake_quantized import ScaledLinear

OUT, IN, GROUP_SIZE = 48, 160, 64  # a ragged last group


def random_weight(scale_bits: int = 16, columns: int = IN) -> QuantizedWeight:
    torch.manual_seed(0)
    weight = torch.randn(OUT, columns)
    bits = torch.tensor([2, 3, 1], dtype=torch.int32)
    scale, zero_point = choose_qparams(weight, bits, GROUP_SIZE)
    scale = storable_scale(scale, scale_bits)
    integers = quantize(weight, scale, zero_point, bits, GROUP_SIZE)
    return QuantizedWeight(integers, scale, zero_point, bits, GROUP_SIZE, scale_bits)


def trained(layer: nn.Module, inputs: Tensor, autocast: bool) -> list[Tensor]:
    """The output, and the gradients, behind shifts that are not zero."""
    for number, parameter in enumerate(layer.parameters()):
        parameter.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(number))
    inputs = inputs.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = layer(inputs)
    (output.float() * torch.linspace(-1, 1, OUT)).square().sum().backward()
    return [output, inputs.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("columns", [IN, 192])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "unpacked"), [(PackedGridLinear, FakeQuantizedLinear), (PackedScaledLinear, ScaledLinear)]
)
def test_packed_integers_train_to_the_bit_as_unpacked_ones_do(
    kind: type[PackedGridLinear],
    unpacked: type[FakeQuantizedLinear],
    with_bias: bool,
    scale_bits: int,
    autocast: bool,
    columns: int,
) -> None:
    weight = random_weight(scale_bits, columns)
    bias = torch.randn(OUT) if with_bias else None
    packed = PackedLinear.from_quantized(weight, bias)
    inputs = torch.randn(3, 10, columns)
    expected = trained(unpacked(packed.quantized_weight(), packed.bias), inputs, autocast)
    for layer in (kind(packed), kind(packed, unpacked=True)):
        found = trained(layer, inputs, autocast)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_the_trained_grid_is_that_of_the_packed_weight() -> None:
    for scale_bits in (8, 16):
        layer = PackedGridLinear(PackedLinear.from_quantized(random_weight(scale_bits), None))
        trained(layer, torch.randn(2, IN), autocast=False)
        whole = pack(layer.quantized_weight())
        grid = layer.packed_grid()
        assert grid.keys() == {"scales", "zeros"}
        assert all(torch.equal(grid[name], whole[name]) for name in grid)
        assert not torch.equal(grid["scales"], pack(random_weight(scale_bits))["scales"])


def largest_kept(layer: nn.Module) -> int:
    """Elements of the largest tensor that autograd keeps for the backward pass."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(1, IN, requires_grad=True)).sum().backward()
    return max(sizes)


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    packed = PackedLinear.from_quantized(random_weight(), None)
    layer = PackedGridLinear(packed)
    assert largest_kept(FakeQuantizedLinear(packed.quantized_weight(), None)) >= OUT * IN
    assert largest_kept(layer) == IN  # the inputs
    held = [*layer.buffers(), *layer._packed.values()]
    assert sum(tensor.nbytes for tensor in held) < OUT * IN / 2


def test_planes_that_another_process_holds_are_received_whenever_the_layer_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = PackedLinear.from_quantized(random_weight(), None)
    owners, own = Ranks(1, 2), PackedGridLinear(packed)
    holder, other = PackedGridLinear(packed, owners, 1), PackedGridLinear(packed, Ranks(0, 2), 1)
    assert holder._packed.keys() - other._packed.keys() == {"qplane1", "qplane2"}
    sent: list[int] = []

    def send(ranks: Ranks, owner: int, tensor: Tensor) -> Tensor:
        """Both planes of the only layer, in turn."""
        sent.append(ranks.rank)
        name = list(holder._planes)[(len(sent) - 1) % 2]
        return tensor.copy_(holder._packed[name].view(torch.uint8))

    monkeypatch.setattr(Ranks, "send", send)
    inputs = torch.randn(4, IN)
    for one, expected in zip(trained(other, inputs, False), trained(own, inputs, False), strict=True):
        assert torch.equal(one, expected)
    assert sent == [0] * 4  # two planes, forwards and backwards
    assert sum(tensor.nbytes for tensor in other._packed.values()) < 50
