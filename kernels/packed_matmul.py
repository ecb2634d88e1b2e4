"""Matrix products with packed weights of 1 to 8 bits, one launch for all the layers that read the same input.

The weight is the left operand of the tensor cores (`outputs.T = weight @ inputs.T`): it goes from its words to their
registers without a buffer of 16-bit floats between (`slimplus.kernels.packed_matmul_kernel`). The same call gives the
same bits. No call waits for the device, and addresses stay the same between calls: a launch can be captured in a CUDA
graph.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from slimplus.format.planes import padded_rows
from slimplus.kernels.fused import FUSED, ONES, PLANES, WIDEST, FusedShape
from slimplus.kernels.launch import LaunchConfig, bucket, default_launch, split_groups, tuned_launch
from slimplus.kernels.occupancy import Resources, resident_programs
from slimplus.kernels.packed_matmul_kernel import MAX_DECODE_TOKENS, packed_matmul_kernel

MAX_TOKENS = 256
"""Largest number of tokens that the kernel takes; beyond, dequantizing the whole weight and multiplying is faster."""
MAX_WIDE_TOKENS = MAX_DECODE_TOKENS.value
"""The same for weights with groups wider than `WIDEST`."""


def packed_matmul(
    inputs: Tensor,
    fused: Mapping[str, Tensor],
    shape: FusedShape,
    counters: Tensor,
    bias: Tensor | None = None,
    launch: LaunchConfig | None = None,
) -> Tensor:
    """Multiply inputs by all the layers of `fused`: `inputs @ weight.T + bias`, side by side.

    Args:
        inputs: `[tokens, in]`, float16 or bfloat16, at most `max_tokens` of the widths.
        fused: tensors of the layers, from `fuse_layers`, on the device of the inputs.
        shape: shape of the layers, from the same call of `fuse_layers`.
        counters: int32 zeros, `shape.counters` of them, which are zeros again after the launch. Two launches that may
            run at the same time must not share them.
        bias: biases of the layers end to end, `[shape.columns]`.
        launch: launch to use instead of the one chosen for this GPU and shape.

    Returns:
        The products, `[tokens, shape.columns]` in the dtype of the inputs; sums are float32.

    Raises:
        ValueError: for other dtypes or sizes, too many tokens, or a launch with more blocks than there are counters.
    """
    tokens, columns = inputs.shape
    if columns != shape.in_features:
        raise ValueError(f"the inputs have {columns} columns, but the layers take {shape.in_features}")
    most = max_tokens(shape.widths)
    if inputs.dtype not in ONES or tokens > most:
        raise ValueError(
            f"packed_matmul takes at most {most} tokens of float16 or bfloat16, not {tokens} of {inputs.dtype}"
        )
    if launch is None:
        arguments = (shape, inputs.dtype, fused["scales"].dtype, bias is not None)
        launch = choose_launch(inputs.device, *arguments, bucket(tokens))
    row_blocks = sum(triton.cdiv(padded_rows(rows), launch.block_n) for rows in shape.out_features)
    token_blocks = triton.cdiv(tokens, launch.block_m)
    if row_blocks * token_blocks > counters.numel():
        raise ValueError(
            f"{counters.numel()} counters are too few for {row_blocks} x {token_blocks} blocks of {launch}"
        )
    outputs = inputs.new_empty(tokens, shape.columns)
    partials = torch.empty(
        (launch.split_k if launch.split_k > 1 else 0) * tokens * shape.padded_columns,
        dtype=torch.float32,
        device=inputs.device,
    )
    packed_matmul_kernel[row_blocks, launch.split_k, token_blocks](
        inputs.contiguous(),
        *(fused[name] for name in FUSED),
        outputs if bias is None else bias,
        partials,
        counters,
        outputs,
        tokens,
        shape.in_features,
        shape.columns,
        shape.padded_columns,
        **kernel_constants(shape, launch, bias is not None),
        num_warps=launch.num_warps,
    )
    return outputs


def max_tokens(widths: Collection[int]) -> int:
    """Return the largest number of tokens that the kernel takes for weights with groups of these widths."""
    return MAX_TOKENS if max(widths) <= WIDEST else MAX_WIDE_TOKENS


@functools.cache
def choose_launch(
    device: torch.device, shape: FusedShape, dtype: torch.dtype, scale_dtype: torch.dtype, has_bias: bool, tokens: int
) -> LaunchConfig:
    """Return the launch for a product: the tuned one if there is any, otherwise a default that fills the GPU.

    Args:
        device: a GPU, or the CPU under Triton's interpreter.
        shape: shape of the layers.
        dtype: dtype of the inputs.
        scale_dtype: dtype of the stored scales.
        has_bias: whether a bias is added.
        tokens: largest number of rows of the inputs, one of `slimplus.kernels.launch.BUCKETS`.
    """
    sizes = shape.out_features, shape.in_features, shape.group_size, tokens
    if device.type != "cuda":
        return default_launch(80, shape.group_size, tokens)
    gpu = torch.cuda.get_device_properties(device)
    if tuned := tuned_launch(gpu.name, *sizes):
        return tuned
    launch = default_launch(10 * gpu.major + gpu.minor, shape.group_size, tokens)
    return split_groups(launch, *sizes, count_slots(device, shape, dtype, scale_dtype, has_bias, launch))


def count_slots(
    device: torch.device,
    shape: FusedShape,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    has_bias: bool,
    launch: LaunchConfig,
) -> int:
    """Return how many programs of a launch a GPU runs at the same time; 1 on a CPU.

    Args:
        device: a GPU, or the CPU under Triton's interpreter.
        shape: shape of the layers.
        dtype: dtype of the inputs.
        scale_dtype: dtype of the stored scales.
        has_bias: whether a bias is added.
        launch: the launch.

    Raises:
        OutOfResources: if a program takes more than the GPU has.
    """
    if device.type != "cuda":
        return 1
    gpu = torch.cuda.get_device_properties(device)
    with torch.cuda.device(device):
        kernel = compile_kernel(shape, dtype, scale_dtype, has_bias, launch)
        kernel._init_handles()  # the driver tells the registers
    resources = Resources(kernel.n_regs, kernel.metadata.shared, launch.num_warps)
    return gpu.multi_processor_count * resident_programs(10 * gpu.major + gpu.minor, resources)


def compile_kernel(
    shape: FusedShape, dtype: torch.dtype, scale_dtype: torch.dtype, has_bias: bool, launch: LaunchConfig
) -> Any:
    """Compile the kernel for the current GPU, without running it, and return what Triton made of it.

    Args:
        shape: shape of the layers.
        dtype: dtype of the inputs.
        scale_dtype: dtype of the stored scales.
        has_bias: whether a bias is added.
        launch: launch to compile for; the kernel serves any `split_k`.
    """
    planes = (torch.int16, *[torch.int32] * (len(PLANES) - 1))
    return packed_matmul_kernel.warmup(
        dtype,
        *planes,
        scale_dtype,
        torch.uint8,
        torch.int16,
        torch.int32,
        dtype,
        torch.float32,
        torch.int32,
        dtype,
        1,
        shape.in_features,
        shape.columns,
        shape.padded_columns,
        **kernel_constants(shape, launch, has_bias),
        num_warps=launch.num_warps,
        grid=(1,),
    )


def kernel_constants(shape: FusedShape, launch: LaunchConfig, has_bias: bool) -> dict[str, int | bool]:
    """Return the compile-time arguments of `packed_matmul_kernel`."""
    return {
        "WIDTHS": sum(1 << width for width in shape.widths),
        "GROUP_SIZE": shape.group_size,
        "LAYERS": len(shape.out_features),
        "RAGGED": shape.in_features % shape.group_size != 0,
        "HAS_BIAS": has_bias,
        "BLOCK_N": launch.block_n,
        "BLOCK_M": launch.block_m,
        "STAGES": launch.num_stages,
    }
