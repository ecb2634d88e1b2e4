"""The algorithm against tensors that the authors' implementation computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from slimplus.quantization.linear import QuantizationConfig, round_weight
from slimplus.quantization.salience import HessianAccumulator, element_salience, group_salience, invert_hessian
from slimplus.quantization.salience_allocation import AllocationSearch, paired_bits
from slimplus.quantization.salience_calibration import calibrate_group

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))


@dataclass(frozen=True)
class Golden:
    """One file: its tensors, and the two numbers in its metadata."""

    tensors: dict[str, Tensor]
    group_size: int
    target_bits: int

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def hessian(self) -> Tensor:
        """The reference counts all the tokens of a batch as one sample: `2 XᵀX`."""
        accumulator = HessianAccumulator(self["inputs"].shape[1], torch.device("cpu"))
        accumulator.add(self["inputs"])
        return accumulator.hessian * accumulator.tokens

    @property
    def salience(self) -> Tensor:
        """With the absolute damping of the reference's search."""
        damped = self.hessian + 0.01 * torch.eye(self["inputs"].shape[1])
        return group_salience(self["weight"], invert_hessian(damped, percdamp=0), self.group_size)


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    with safe_open(request.param, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Golden(tensors, int(metadata["group_size"]), int(metadata["target_bits"]))


def test_there_are_golden_files() -> None:
    assert len(FILES) == 4


def test_group_salience(golden: Golden) -> None:
    torch.testing.assert_close(golden.salience.double(), golden["group_salience"], rtol=1e-3, atol=0)


def test_divergence_curve_and_bits(golden: Golden) -> None:
    search = AllocationSearch(golden["weight"], golden.salience, golden.target_bits, golden.group_size)
    search.add(golden["inputs"])
    curve = search.divergence / len(golden["inputs"])
    torch.testing.assert_close(curve[1:], golden["search_kl"], rtol=1e-3, atol=0)
    # The reference never tries p = 0, which may win here.
    pairs = int(curve[1:].argmin()) + 1
    bits = paired_bits(golden.salience, pairs, golden.target_bits, golden["weight"].shape[1], golden.group_size)
    assert torch.equal(bits, golden["bits"])


def test_cholesky_factor(golden: Golden) -> None:
    if "hinv_cholesky_upper" not in golden.tensors:
        pytest.skip("left out of this file, to keep it small")
    inverse = invert_hessian(golden.hessian, percdamp=0.01)
    torch.testing.assert_close(inverse.upper, golden["hinv_cholesky_upper"], rtol=1e-3, atol=1e-6)


def test_salience_weighted_calibration(golden: Golden) -> None:
    salience = element_salience(golden["weight"], invert_hessian(golden.hessian, percdamp=0.01))
    tiles = zip(
        golden["weight"].split(golden.group_size, 1), salience.split(golden.group_size, 1), golden["bits"], strict=True
    )
    for group, (tile, tile_salience, bits) in enumerate(tiles):
        scale, zero_point = calibrate_group(tile, tile_salience, int(bits))
        if bits == 1:  # the reference's levels are `zero ± scale`
            scale, zero_point = scale / 2, (0.5 - zero_point) * scale
        torch.testing.assert_close(scale, golden["sqc_scale"][:, group], rtol=1e-4, atol=0)
        torch.testing.assert_close(zero_point, golden["sqc_zero"][:, group], rtol=1e-4, atol=1e-6)


def test_output_error_is_no_larger(golden: Golden) -> None:
    hessian = golden.hessian
    config = QuantizationConfig("slimllm", golden.target_bits, golden.group_size)
    quantized = round_weight(golden["weight"], golden["bits"], hessian, invert_hessian(hessian), config).weight
    weight = quantized.dequantize()
    error = (golden["inputs"] @ (weight - golden["weight"]).T).double().square().sum()
    assert error <= golden["gptq_output_error"]
