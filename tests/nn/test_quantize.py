"""One layer or a module of one's own is quantized as a block of a recipe's run is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimplus
from slimplus.blockwise.calibrate import quantize_block
from slimplus.blockwise.data import BlockData
from slimplus.format.affine import weight_bits
from slimplus.models.block_arguments import run_block
from slimplus.models.streaming import BlockInputs
from slimplus.nn import PackedLinear
from slimplus.quantization.linear import QuantizationConfig
from slimplus.utils.errors import InputError
from tests.support.blocks import RUNNER

GROUP = 16
SPREAD = torch.exp(torch.linspace(-2, 2, 80))


def inputs(rows: int = 200, seed: int = 1) -> Tensor:
    """Correlated, and of columns that matter more or less."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(80, 80, generator=torch.Generator().manual_seed(9))
    return (torch.randn(rows, 80, generator=generator) @ mixing) * SPREAD


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(80, 48, bias=bias)


class Network(nn.Module):
    """Layers inside others, one used twice, a normalization, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(80, 64)
        self.body = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(2)])
        self.again = self.embed
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.embed(x)
        for block in self.body:
            hidden = self.dropout(block(hidden))
        return scale * self.head(hidden)


@torch.no_grad()
def error(packed: nn.Module, full: nn.Module, x: Tensor) -> float:
    expected = full(x)
    return float((packed(x) - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", ["rtn", "gptq", "slimllm"])
def test_a_module_is_quantized_to_the_bit_as_a_block_is(
    block_and_inputs: tuple[nn.Module, BlockInputs], method: Any
) -> None:
    stored, given = block_and_inputs
    block = RUNNER.load(stored)
    search: Any = "slimllm" if method == "slimllm" else "uniform"
    config = QuantizationConfig(method, 2, GROUP, allocation=search)
    result = quantize_block(BlockData(block, given.hidden, given.arguments[0], RUNNER), config)

    class Bound(nn.Module):
        """The block with all its arguments but the first."""

        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden: Tensor) -> Any:
            return run_block(self.block, hidden, given.arguments[0])

    packed = slimplus.quantize_module(Bound(), list(given.hidden.split(1)), 2, group_size=GROUP, method=method)
    found = {name: child for name, child in packed.block.named_modules() if isinstance(child, PackedLinear)}
    assert list(found) == list(result.weights)
    for name, weight in result.weights.items():
        own = found[name].quantized_weight()
        for part in ("integers", "scale", "zero_point", "bits"):
            assert torch.equal(getattr(own, part), getattr(weight, part)), (name, part)
    if method == "slimllm":
        assert any((weight.bits != 2).any() for weight in result.weights.values())


def test_a_layer_keeps_its_average_its_bias_and_most_of_its_output() -> None:
    full = layer()
    packed = slimplus.quantize_linear(full, inputs(), bits=3, group_size=GROUP)
    bits = packed.quantized_weight().bits
    assert weight_bits(bits, GROUP, 48, 80) == 3 * 48 * 80
    assert packed.bias is not None
    assert torch.equal(packed.bias, full.bias)
    assert error(packed, full, inputs(seed=2)) < 0.2
    assert not packed.bias.requires_grad


def test_calibration_beats_rounding_and_salience_beats_equal_widths() -> None:
    full = layer()
    options: dict[str, dict[str, Any]] = {"rtn": {"method": "rtn"}, "uniform": {"allocation": "uniform"}, "slimllm": {}}
    errors = {
        name: error(slimplus.quantize_linear(full, inputs(2000), group_size=GROUP, **given), full, inputs(seed=2))
        for name, given in options.items()
    }
    assert errors["slimllm"] < errors["uniform"] < errors["rtn"]


def test_a_weight_batches_and_a_generator_give_the_same() -> None:
    full, tokens = layer(bias=False), inputs(256)
    whole = slimplus.quantize_linear(full, tokens, group_size=GROUP)
    batches = (part.view(2, 32, 80) for part in tokens.split(64))
    for other in (
        slimplus.quantize_linear(full.weight, tokens, group_size=GROUP),
        slimplus.quantize_linear(full, batches, group_size=GROUP),
    ):
        assert other.bias is None
        assert torch.equal(other.quantized_weight().bits, whole.quantized_weight().bits)
        assert torch.allclose(other.dequantize(), whole.dequantize(), atol=1e-6)


def test_given_widths_are_met() -> None:
    widths = [1, 2, 8, 3, 2]
    for allocation in (widths, torch.tensor(widths)):
        packed = slimplus.quantize_linear(layer(), inputs(), bits=1, group_size=GROUP, allocation=allocation)
        assert packed.quantized_weight().bits.tolist() == widths


def test_rounding_to_equal_widths_needs_no_inputs() -> None:
    packed = slimplus.quantize_linear(layer(), bits=8, group_size=GROUP, method="rtn", scale_bits=8)
    assert packed.quantized_weight().scale_bits == 8
    assert error(packed, layer(), inputs()) < 0.03


def test_a_half_precision_layer_stays_where_and_what_it_is() -> None:
    full = layer().to(torch.bfloat16)
    packed = slimplus.quantize_linear(full, inputs().to(torch.bfloat16), bits=4, group_size=GROUP)
    x = inputs(seed=2).to(torch.bfloat16)
    assert packed(x).dtype == torch.bfloat16
    assert packed.scales.device == full.weight.device
    assert error(packed, full, x) < 0.1


def test_the_pieces_give_what_the_whole_gives() -> None:
    full = layer()
    weight = full.weight.detach()
    hessian = slimplus.HessianAccumulator(80, weight.device)
    hessian.add(inputs())
    salience = slimplus.group_salience(weight, slimplus.invert_hessian(hessian.hessian), GROUP)
    bits = slimplus.allocate_bits(weight, salience, [inputs()], 2, GROUP)
    packed = slimplus.quantize_linear(full, inputs(), 2, group_size=GROUP)
    quantized = packed.quantized_weight()
    assert torch.equal(bits, quantized.bits)
    for name, tensor in slimplus.pack(quantized).items():
        assert torch.equal(tensor, packed.packed_tensors()[name]), name
    again = slimplus.unpack(packed.packed_tensors(), 48, 80, GROUP)
    assert torch.equal(again.dequantize(), packed.dequantize())
    scale, zero_point = slimplus.calibrate_group(weight[:, :GROUP], torch.ones(48, GROUP), 3)
    assert scale.shape == zero_point.shape == (48,)


def test_a_module_is_copied_and_left_as_it_is() -> None:
    network = Network().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    packed = slimplus.quantize_module(network, [inputs(), inputs(seed=2)], bits=4, group_size=GROUP, skip=["head"])
    assert network.training
    assert packed.training
    assert not network.embed._forward_pre_hooks
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    kinds = {name: type(child) for name, child in packed.named_modules() if isinstance(child, nn.Linear | PackedLinear)}
    assert kinds == {"embed": PackedLinear, "body.0.0": PackedLinear, "body.1.0": PackedLinear, "head": nn.Linear}
    assert packed.again is packed.embed
    assert packed.head is not network.head
    assert error(packed.eval(), network.eval(), inputs(seed=3)) < 0.2
    half = packed.to(torch.bfloat16)
    assert half(inputs(seed=3).to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "mapping", "mappings", "iterator"])
def test_batches_are_arguments_keyword_arguments_or_one_tensor(kind: str) -> None:
    network, x = Network(), inputs(50)
    batches: dict[str, Any] = {
        "tensor": x,
        "tuple": [(x, 2.0)],
        "list": [[x]],
        "mapping": {"x": x},
        "mappings": [{"x": x, "scale": 2.0}],
        "iterator": iter([x]),
    }
    options: dict[str, Any] = {"group_size": GROUP, "method": "gptq"}
    expected = slimplus.quantize_module(network, [x], **options).state_dict()
    found = slimplus.quantize_module(network, batches[kind], **options).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_lone_layer_is_a_module_too() -> None:
    packed = slimplus.quantize_module(layer(), inputs(), group_size=GROUP)
    assert isinstance(packed, PackedLinear)
    assert torch.equal(packed.dequantize(), slimplus.quantize_linear(layer(), inputs(), group_size=GROUP).dequantize())


def test_a_subclass_of_linear_is_left_alone() -> None:
    attention = nn.MultiheadAttention(80, 4)
    network = nn.ModuleDict({"attention": attention, "out": layer()})
    packed = slimplus.quantize_module(network, bits=4, group_size=GROUP, method="rtn")
    assert isinstance(packed["out"], PackedLinear)
    assert type(packed["attention"].get_submodule("out_proj")) is type(attention.out_proj)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"bits": 8}, "bits: expected 2 to 7 with allocation='slimllm', got 8"),
        ({"bits": 2.5}, "bits: expected 2 to 7 with allocation='slimllm', got 2.5"),
        ({"bits": 9, "allocation": "uniform"}, "bits: expected 1 to 8 with allocation='uniform', got 9"),
        ({"method": "qat"}, "method: expected rtn, gptq, slimllm, got 'qat'; the others train, in a recipe's run"),
        ({"allocation": "model"}, "allocation: expected uniform, slimllm or the width of each group, got 'model'"),
        ({"allocation": [2, 2]}, "allocation: expected 5 widths from 1 to 8, one for each group of 16 columns"),
        ({"allocation": [2, 2, 2, 2, 9]}, "allocation: expected 5 widths from 1 to 8"),
        ({"group_size": 24}, "group_size: expected a multiple of 16, got 24"),
        ({"scale_bits": 4}, "scale_bits: expected 8 or 16, got 4"),
        ({"percdamp": 0}, "percdamp: expected a number above 0 and at most 1, got 0"),
        ({"inputs": None}, "inputs: method='slimllm' with allocation='slimllm' needs those of the layer"),
        ({"inputs": []}, "inputs: method='slimllm' with allocation='slimllm' needs those of the layer"),
        ({"inputs": torch.ones(3, 79)}, "inputs: [3, 79] does not end in the 80 columns of the weight"),
        ({"inputs": torch.full((3, 80), torch.nan)}, "inputs: there is NaN or infinity among them"),
        ({"layer": nn.Conv1d(2, 2, 2)}, "layer: expected an nn.Linear or its weight, got Conv1d"),
        ({"layer": torch.ones(4)}, "layer: expected a weight [out, in], got [4]"),
        ({"layer": torch.full((4, 80), torch.inf)}, "the weight holds NaN or infinity"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"layer": layer(), "inputs": inputs(), "group_size": GROUP} | arguments
    with pytest.raises(InputError) as caught:
        slimplus.quantize_linear(**given)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"skip": ["haed"]}, "skip: no linear layer is called 'haed'; there are embed, body.0.0, body.1.0, head"),
        ({"batches": None}, "batches: none has reached embed; give some that do, or name it in skip"),
        ({"module": nn.GELU()}, "module: it has no linear layer to quantize"),
        ({"bits": 1}, "bits: expected 2 to 7 with allocation='slimllm', got 1"),
        ({"batches": [torch.full((3, 80), torch.inf)]}, "embed: inputs: there is NaN or infinity among them"),
    ],
)
def test_a_module_that_cannot_be_quantized_is_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"module": Network(), "batches": [inputs()], "group_size": GROUP} | arguments
    with pytest.raises(InputError) as caught:
        slimplus.quantize_module(**given)
    assert sentence in str(caught.value)
