"""Packed tensors from strangers: refused with a clear error, or they can be unpacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimplus.format.affine import QuantizedWeight, choose_qparams, quantize, storable_scale, storable_zero_point
from slimplus.format.checks import check_packed
from slimplus.format.planes import pack, unpack
from tests.support.fuzzing import fuzz, refusal

GROUP_SIZE, SHAPE = 16, (20, 72)


@pytest.fixture(scope="module")
def packed() -> dict[str, Tensor]:
    """A packed weight with groups of every width that are not in the order of the columns."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor([3, 1, 8, 2, 4], dtype=torch.int32)
    scale, zero_point = choose_qparams(weight, bits, GROUP_SIZE)
    scale, zero_point = storable_scale(scale), storable_zero_point(zero_point, bits)
    integers = quantize(weight, scale, zero_point, bits, GROUP_SIZE)
    return pack(QuantizedWeight(integers, scale, zero_point, bits, GROUP_SIZE))


def test_what_pack_gives_passes(packed: dict[str, Tensor]) -> None:
    check_packed(packed, SHAPE, GROUP_SIZE)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("group_index", lambda t: t.fill_(1), "group_index is not a permutation of 5 groups"),
        ("group_index", lambda t: t.add_(1), "group_index is not a permutation of 5 groups"),
        ("group_index", lambda t: t.sub_(1), "group_index is not a permutation of 5 groups"),
        ("group_bits", lambda t: t.zero_(), "group_bits: widths outside 1 to 8"),
        ("group_bits", lambda t: t.fill_(255), "group_bits: widths outside 1 to 8"),
        ("group_bits", lambda t: t.copy_(t.flip(0)), "group_bits does not hold the widths .* in rising order"),
        ("group_bits", lambda t: t[0].fill_(2), "qplane1 is torch.int16"),
        ("scales", lambda t: t[0, 0].fill_(torch.nan), "scales holds values that are negative or not finite"),
        ("scales", lambda t: t[4, 3].fill_(torch.inf), "scales holds values that are negative or not finite"),
        ("scales", lambda t: t[2, 1].fill_(-1), "scales holds values that are negative or not finite"),
        ("scales", lambda t: t.resize_(5, 16), "scales is torch.float16 .5, 16. instead of torch.float16 .5, 32."),
        ("qplane2", lambda t: t.resize_(1, 32), "qplane2 is torch.int32 .1, 32."),
        ("qplane4", lambda t: t.set_(), "qplane4 is torch.int32 .0. instead"),
    ],
)
def test_tensors_that_are_refused(
    packed: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    tensors = {key: tensor.clone() for key, tensor in packed.items()}
    change(tensors[name])
    with pytest.raises(ValueError, match=message):
        check_packed(tensors, SHAPE, GROUP_SIZE)


def test_exponents_beyond_float16_are_refused(packed: dict[str, Tensor]) -> None:
    weight = replace(unpack(packed, *SHAPE, GROUP_SIZE), scale_bits=8)
    tensors = pack(weight)
    check_packed(tensors, SHAPE, GROUP_SIZE)
    tensors["scales"][:-1] = 255
    tensors["scales"][-1] = 23
    check_packed(tensors, SHAPE, GROUP_SIZE)
    assert unpack(tensors, *SHAPE, GROUP_SIZE).dequantize().isfinite().all()
    tensors["scales"][-1, 0] = 24
    with pytest.raises(ValueError, match="scales holds exponents above 23"):
        check_packed(tensors, SHAPE, GROUP_SIZE)


@fuzz(2000)
@given(data=st.data())
def test_damaged_tensors_are_refused_or_can_be_unpacked(packed: dict[str, Tensor], data: st.DataObject) -> None:
    tensors = {key: tensor.clone() for key, tensor in packed.items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    match data.draw(st.sampled_from(("bit", "bit", "dtype", "shape", "cut", "swap", "remove"))):
        case "bit":
            raw = tensor.view(torch.uint8).view(-1)
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "dtype":
            dtypes = (torch.float32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float16, torch.bfloat16)
            tensors[name] = tensor.to(data.draw(st.sampled_from(dtypes)))
        case "shape":
            tensors[name] = tensor.t() if tensor.dim() == 2 and data.draw(st.booleans()) else tensor[None]
        case "cut":
            tensors[name] = tensor[: data.draw(st.integers(0, len(tensor) - 1))]
        case "swap":
            other = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case "remove":
            del tensors[name]
    if (said := refusal(lambda: check_packed(tensors, SHAPE, GROUP_SIZE))) is not None:
        assert any(key in said for key in packed)
        return
    assert torch.isfinite(unpack(tensors, *SHAPE, GROUP_SIZE).dequantize()).all()
