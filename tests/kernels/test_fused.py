"""Several packed weights fused into the tensors that one product reads."""

from __future__ import annotations

import pytest
import torch

from slimplus.format.affine import QuantizedWeight, choose_qparams
from slimplus.format.planes import count_bits, pack
from slimplus.kernels.fused import fuse_layers, split_layers
from slimplus.nn.backends.triton import TritonWeight

pytest.importorskip("triton")

from slimplus.kernels.packed_matmul import MAX_TOKENS, max_tokens


def quantized(rows: int, columns: int, widths: list[int], group_size: int = 32) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    bits = torch.tensor(widths, dtype=torch.int32)
    scale, zero_point = choose_qparams(weight, bits, group_size)
    return QuantizedWeight(torch.ones(rows, columns, dtype=torch.uint8), scale, zero_point, bits, group_size)


def test_layers_come_back_as_they_went_in_and_share_memory() -> None:
    weights = [quantized(20, 96, [1, 2, 3]), quantized(5, 96, [4, 4, 2]), quantized(33, 96, [3, 3, 3])]
    packed, counts, rows = [pack(each) for each in weights], [count_bits(each.bits) for each in weights], [20, 5, 33]
    fused, shape = fuse_layers(packed, counts, rows, 96, 32)
    assert (shape.out_features, shape.columns, shape.widths) == ((20, 5, 33), 58, (1, 2, 3, 4))
    layers = split_layers(fused, counts, rows, 32)
    for original, layer in zip(packed, layers, strict=True):
        assert set(layer) == set(original) - {"group_bits"}
        for name, tensor in layer.items():
            assert torch.equal(tensor, original[name])
            assert tensor.untyped_storage().data_ptr() == fused[name].untyped_storage().data_ptr()


def test_a_single_weight_is_not_copied() -> None:
    weight = quantized(20, 96, [2, 2, 3])
    packed = pack(weight)
    fused, shape = fuse_layers([packed], [count_bits(weight.bits)], [20], 96, 32)
    assert shape.widths == (2, 3)
    assert all(fused[name].data_ptr() == packed[name].data_ptr() for name in ("qplane1", "qplane2", "scales", "zeros"))
    assert fused["qplane4"].numel() == 0


def test_what_no_kernel_multiplies_is_refused() -> None:
    weight = quantized(20, 96, [2, 5], group_size=48)
    with pytest.raises(ValueError, match="no kernel for groups of 48 columns"):
        fuse_layers([pack(weight)], [count_bits(weight.bits)], [20], 96, 48)
    weight = quantized(20, 96, [2, 5, 3])
    with pytest.raises(ValueError, match="does not describe 3 groups"):
        fuse_layers([pack(weight)], [{2: 2}], [20], 96, 32)


@pytest.mark.parametrize(("widths", "tokens"), [((1, 4), MAX_TOKENS), ((2, 5), 16), ((8,), 16)])
def test_wide_groups_are_multiplied_by_few_tokens(widths: tuple[int, ...], tokens: int) -> None:
    assert max_tokens(widths) == tokens
    assert TritonWeight.supports(tokens, widths, 64)
    assert not TritonWeight.supports(tokens + 1, widths, 64)
    assert not TritonWeight.supports(0, widths, 64)
    assert not TritonWeight.supports(1, widths, 48)
