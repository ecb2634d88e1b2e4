"""What the compiler makes of every launch that is shipped, for GPUs that are not there.

Instructions per weight are counted in the machine code of the loop over groups: a loop is what lies between a branch
backwards and its target, and one pass of it multiplies one group, `block_n x group_size` weights, by all the threads of
a program. So the count is `instructions x threads / (block_n x group_size)`, with everything that is in the loop:
addresses, loads of weights, inputs, scales and zero points, the products, and instructions that a predicate skips.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.machine_code import MachineCode, compiling_for, disassemble
from benchmarks.kernels import MODELS
from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import DEFAULTS, LaunchConfig, blocks, default_launch, split_groups
from slimplus.kernels.occupancy import Resources, resident_programs
from slimplus.kernels.packed_matmul import compile_kernel

WIDTHS = (1, 2, 3, 4)
ARCHITECTURES = (80, 89, 90, 100, 120)
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LAUNCHES = [
    pytest.param(architecture, launch, layers, dtype, id=f"sm_{architecture}-{most}-{layers}-{name}")
    for architecture in ARCHITECTURES
    for most, launch in DEFAULTS.get(architecture, DEFAULTS[80]).items()
    for layers in ((1, 3) if architecture == 90 and most <= 16 else (3,))
    for dtype, name in DTYPES.items()
    if dtype == torch.bfloat16 or (architecture == 90 and layers == 3)
]
MOST_DECODE_TOKENS = 16
MOST_SPILLS = 8  # instructions before and after the loops, which run once a program
MOST_INSTRUCTIONS = {
    256: {1: 3.0, 2: 3.0, 3: 4.4, 4: 3.2},
    128: {1: 2.6, 2: 2.6, 3: 4.2, 4: 2.7},
    64: {1: 3.1, 2: 3.1, 3: 4.4, 4: 3.2},
}
"""Group size → bits → per weight, in decoding at most 16 tokens on any architecture."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]


@functools.cache
def compile_product(
    architecture: int,
    launch: LaunchConfig,
    dtype: torch.dtype,
    layers: int,
    in_features: int,
    group_size: int,
    scales: torch.dtype = torch.float16,
    widths: tuple[int, ...] = WIDTHS,
    has_bias: bool = True,
) -> MachineCode:
    """The kernel for weights with groups of some widths."""
    shape = FusedShape(in_features, group_size, (4096,) * layers, widths)
    with compiling_for(architecture):
        return disassemble(compile_kernel(shape, dtype, scales, has_bias, launch))


def check(
    code: MachineCode, architecture: int, launch: LaunchConfig, group_size: int, widths: int = len(WIDTHS)
) -> list[float]:
    """Fail on spills, products outside the tensor cores or converted weights.

    Returns:
        Instructions per weight in the loop of each width.
    """
    assert code.local == 0
    assert code.spills <= MOST_SPILLS
    assert code.shared <= SHARED_MEMORY[architecture]
    loops = code.product_loops()
    assert len(loops) == widths
    weights = launch.block_n * group_size / (32 * launch.num_warps)  # of one thread in one pass
    for loop in loops:
        names = [instruction.name for instruction in loop]
        assert not [name for name in names if name.startswith(("LDL", "STL"))]
        products = [name for name in names if "MMA" in name]
        assert products
        # Those of the tensor memory of sm_100 do not name the type of their sums.
        assert all(".F32" in name for name in products if name.startswith(("HMMA", "HGMMA"))), products
        assert sum(name.startswith("I2F") for name in names) <= weights / 4  # zero points, not weights
    return [len(loop) / weights for loop in loops]


@pytest.mark.parametrize(("architecture", "launch", "layers", "dtype"), LAUNCHES)
def test_shipped_launches_compile_well(
    architecture: int, launch: LaunchConfig, layers: int, dtype: torch.dtype
) -> None:
    code = compile_product(architecture, launch, dtype, layers, 4096, 128)
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
    launch = default_launch(90, group_size, most)
    code = compile_product(90, launch, torch.bfloat16, layers=1, in_features=in_features, group_size=group_size)
    instructions = check(code, 90, launch, group_size)
    if not in_features % group_size:
        check_counts(instructions, group_size)


@pytest.mark.parametrize(("most", "group_size"), [(8, 64), (8, 128), (256, 128)])
def test_8_bit_scales_cost_no_more(most: int, group_size: int) -> None:
    launch = default_launch(90, group_size, most)
    code = compile_product(90, launch, torch.bfloat16, 1, 4096, group_size, scales=torch.uint8)
    instructions = check(code, 90, launch, group_size)
    if most == 8:
        check_counts(instructions, group_size)


@pytest.mark.parametrize(("widths", "most"), [((2,), 1.6), ((3,), 2.7), ((1, 2, 3), 1.9)], ids=str)
def test_instructions_a_weight_of_decoding(widths: tuple[int, ...], most: float) -> None:
    """On average, with twice as many groups of 2 bits as of others, in layers without a bias, as those of LLaMA."""
    launch = default_launch(90, 128, 1)
    code = compile_product(90, launch, torch.bfloat16, 3, 4096, 128, widths=widths, has_bias=False)
    instructions = check(code, 90, launch, 128, len(widths))
    weights = [2 if width == 2 else 1 for width in widths]
    mean = sum(count * weight for count, weight in zip(instructions, weights, strict=True)) / sum(weights)
    assert mean <= most
    for loop in code.product_loops():
        loads = [instruction.name for instruction in loop if instruction.name.startswith("LDG.")]
        assert loads == ["LDG.E.U16"]  # the index of a later group; all else is copied asynchronously


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("tokens", "bits"), [(8, 8), (16, 8), (16, 7)])
def test_wide_groups_are_decoded_without_spills(architecture: int, tokens: int, bits: int) -> None:
    """Of 8 bits, which are two products, and of 7, which read three planes."""
    launch = default_launch(architecture, 128, tokens)
    code = compile_product(architecture, launch, torch.bfloat16, 1, 4096, 128, widths=(bits,), has_bias=False)
    (count,) = check(code, architecture, launch, 128, 1)
    assert code.stack == code.spills == 0
    assert count <= 6.5


def test_groups_of_8_bits_are_bound_by_memory() -> None:
    """In float16 as in bfloat16: an H200 takes 6 instructions a weight in the time in which it reads its byte."""
    for dtype, most in ((torch.bfloat16, 3.4), (torch.float16, 2.3)):
        launch = default_launch(90, 128, 1)
        code = compile_product(90, launch, dtype, 1, 4096, 128, widths=(8,), has_bias=False)
        (count,) = check(code, 90, launch, 128, 1)
        assert count <= most


@pytest.mark.parametrize(
    ("architecture", "multiprocessors"),
    [pytest.param(90, 132, id="H100, H200"), pytest.param(80, 108, id="A100"), pytest.param(89, 128, id="RTX 4090")],
)
def test_no_default_launch_for_one_token_has_a_tail_wave(architecture: int, multiprocessors: int) -> None:
    """With the kernel for all widths and several layers, which takes the most registers; others only make room."""
    launch = default_launch(architecture, 128, 1)
    code = compile_product(architecture, launch, torch.bfloat16, 3, 4096, 128)
    resources = Resources(code.registers, code.shared, launch.num_warps)
    slots = multiprocessors * resident_programs(architecture, resources)
    for out_features, in_features in (shape for model in MODELS.values() for shape in model.values()):
        chosen = split_groups(launch, out_features, in_features, 128, 1, slots)
        assert blocks(chosen, out_features, 1) * chosen.split_k <= slots


def check_counts(instructions: list[float], group_size: int) -> None:
    most = MOST_INSTRUCTIONS[group_size]
    assert all(count <= most[bits] for bits, count in zip(WIDTHS, instructions, strict=True)), instructions
