"""What the compiler makes of every launch that is shipped, for GPUs that are not there.

Instructions per weight are counted in the machine code of the loop over groups: a loop is what lies between a branch
backwards and its target, and one pass of it multiplies one group, `block_n x group_size` weights, by all the threads of
a program. So the count is `instructions x threads / (block_n x group_size)`, with everything that is in the loop:
addresses, loads of weights, inputs, scales and zero points, the products, and instructions that a predicate skips.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from slimplus.kernels.fused import WIDTHS, FusedShape
from slimplus.kernels.launch import DEFAULTS, LaunchConfig, default_launch
from slimplus.kernels.packed_matmul import kernel_constants, packed_matmul_kernel
from tests.support.sass import MachineCode, compile_kernel

ARCHITECTURES = (80, 89, 90)
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
LAUNCHES = [
    pytest.param(architecture, launch, layers, id=f"sm_{architecture}-{most}-{layers}")
    for architecture in ARCHITECTURES
    for most, launch in DEFAULTS.get(architecture, DEFAULTS[80]).items()
    for layers in ((1, 3) if architecture == 90 and most <= 16 else (3,))
]
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
MOST_DECODE_TOKENS = 16
MOST_INSTRUCTIONS = {
    256: {1: 3.0, 2: 3.0, 3: 4.2, 4: 3.0},
    128: {1: 2.6, 2: 2.6, 3: 4.2, 4: 2.6},
    64: {1: 3.1, 2: 3.1, 3: 4.4, 4: 3.1},
}
"""Group size → bits → per weight, in decoding at most 16 tokens on any architecture."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]


def compile_product(
    architecture: int,
    launch: LaunchConfig,
    dtype: torch.dtype,
    layers: int,
    in_features: int,
    group_size: int,
    scales: str = "*fp16",
) -> MachineCode:
    """The kernel for weights with groups of 1, 2, 3 and 4 bits and a bias."""
    pointers = {"plane1": "*i16", "plane2": "*i32", "plane4": "*i32", "scales": scales, "zeros": "*u8"}
    pointers |= {"group_index": "*i16", "layer_table": "*i32", "partials": "*fp32", "counters": "*i32"}
    pointers |= dict.fromkeys(("inputs", "outputs", "bias"), f"*{DTYPES[dtype]}")
    shape = FusedShape(in_features, group_size, (4096,) * layers, WIDTHS)
    constants = kernel_constants(shape, launch, has_bias=True)
    sizes = ("out_features", "padded_features", *(() if in_features % 16 else ("in_features",)))
    return compile_kernel(packed_matmul_kernel, pointers, constants, architecture, launch.num_warps, sizes)


def check(code: MachineCode, architecture: int, launch: LaunchConfig, group_size: int) -> list[float]:
    """Fail on spills, products outside the tensor cores or converted weights.

    Returns:
        Instructions per weight in the loop of each width.
    """
    assert code.stack == code.local == 0
    assert not [name for name in code.names() if name.startswith(("LDL", "STL"))]
    assert code.shared <= SHARED_MEMORY[architecture]
    loops = code.product_loops()
    assert len(loops) == len(WIDTHS)
    weights = launch.block_n * group_size / (32 * launch.num_warps)  # of one thread in one pass
    for loop in loops:
        names = [instruction.name for instruction in loop]
        products = [name for name in names if name.startswith(("HMMA", "HGMMA"))]
        assert products
        assert all(".F32" in name for name in products), products
        assert sum(name.startswith("I2F") for name in names) <= weights / 4  # zero points, not weights
    return [len(loop) / weights for loop in loops]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize(("architecture", "launch", "layers"), LAUNCHES)
def test_shipped_launches_compile_well(
    architecture: int, launch: LaunchConfig, dtype: torch.dtype, layers: int
) -> None:
    code = compile_product(architecture, launch, dtype, layers, in_features=4096, group_size=128)
    instructions = check(code, architecture, launch, 128)
    for bits, loop in zip(WIDTHS, code.product_loops(), strict=True):
        bytes_a_thread = (launch.block_n * bits / 8 + launch.block_m * 2) * 128 / (32 * launch.num_warps)
        wide = [i.name for i in loop if i.name.startswith(("LDG.", "LDGSTS.")) and i.name.endswith(".128")]
        assert len(wide) >= bytes_a_thread // 16  # weights and inputs
    if launch.block_m <= MOST_DECODE_TOKENS:
        check_counts(instructions, 128)


@pytest.mark.parametrize(
    ("most", "group_size", "in_features"),
    [(8, 64, 4096), (16, 64, 4096), (8, 256, 4096), (16, 256, 4096), (8, 32, 4104), (256, 64, 4104)],
)
def test_other_groups_and_ragged_columns_compile_well(most: int, group_size: int, in_features: int) -> None:
    launch = default_launch(90, (4096,), in_features, group_size, most, multiprocessors=132)
    code = compile_product(90, launch, torch.bfloat16, layers=1, in_features=in_features, group_size=group_size)
    instructions = check(code, 90, launch, group_size)
    if not in_features % group_size:
        check_counts(instructions, group_size)


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("most", [8, 256])
def test_8_bit_scales_cost_no_more(most: int, group_size: int) -> None:
    launch = default_launch(90, (4096,), 4096, group_size, most, multiprocessors=132)
    code = compile_product(90, launch, torch.bfloat16, 1, 4096, group_size, scales="*u8")
    instructions = check(code, 90, launch, group_size)
    if most == 8:
        check_counts(instructions, group_size)


def check_counts(instructions: list[float], group_size: int) -> None:
    most = MOST_INSTRUCTIONS[group_size]
    assert all(count <= most[bits] for bits, count in zip(WIDTHS, instructions, strict=True)), instructions
