"""Predicted time of a product with packed weights for one token, before any GPU is asked.

The constants were fitted to 20 products of an H100, those of LLaMA-7B in
benchmarks/results/kernels_nvidia_h100_80gb_hbm3.json (bfloat16, groups of 128, Triton 3.6): 2.4% is the mean error, 13%
the largest. Other GPUs, types and kernels are extrapolated, so that a prediction that fails says where to look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MICROSECOND = 1e-6
LAUNCH, LOAD, FENCE, REDUCTION, SWITCH = (each * MICROSECOND for each in (2.0, 0.75, 1.1, 0.4, 0.45))
"""Seconds: of an empty launch; of a load that others wait for (there are `SERIAL_LOADS`); of the fence and the atomic
addition before a reduction; of a round of partial sums; of going from one width to the next."""
SERIAL_LOADS = 3  # the table of layers, the index of the group, the inputs
LONE_GROUP = 0.665 * MICROSECOND  # a group of a program in a tail wave, where nothing hides its latencies
BLOCK_REST = 20 * MICROSECOND  # what a decoder block takes besides its products: norms, positions, attention
INSTRUCTIONS_A_SECOND = 14e12  # of a thread
BYTES_A_SECOND = 2.7e12


@dataclass(frozen=True)
class Kernel:
    """What the time of a product depends on in its kernel.

    Attributes:
        instructions: width → instructions a weight in the loop over groups, counted in the machine code for sm_90.
        parts_at_once: partial sums that are read at the same time.
        every_width: whether every program multiplies groups of all widths.
    """

    instructions: Mapping[int, float]
    parts_at_once: int
    every_width: bool


FITTED = Kernel({1: 1.95, 2: 1.87, 3: 3.08, 4: 2.0}, parts_at_once=4, every_width=True)
"""The kernel that the constants were fitted to, that of commit 9425e36."""
CURRENT = Kernel(
    {1: 1.70, 2: 1.60, 3: 2.66, 4: 1.94, 5: 3.0, 6: 2.9, 7: 4.0, 8: 3.4}, parts_at_once=16, every_width=False
)
"""The kernel of this version, for one token."""


@dataclass(frozen=True)
class Product:
    """A product for one token.

    Attributes:
        weights: number of weights, of all layers.
        size: size of the packed tensors, in bytes.
        groups: number of groups of each width in a row of the weight.
        blocks: blocks of the output, which share no sums.
        split_k: programs that share the groups of a block.
    """

    weights: int
    size: int
    groups: Mapping[int, int]
    blocks: int
    split_k: int


@dataclass(frozen=True)
class Prediction:
    """Seconds of a product, by what takes them.

    Attributes:
        fixed: launch, serial loads, and the sums of the programs that share groups.
        stream: instructions, or bytes if these take longer.
        switches: starts of the loops over the further widths.
        tail: programs beyond those that run at the same time.
    """

    fixed: float
    stream: float
    switches: float
    tail: float

    @property
    def total(self) -> float:
        """Seconds of the product."""
        return self.fixed + self.stream + self.switches + self.tail


def predict(product: Product, multiprocessors: int, resident: int, kernel: Kernel = CURRENT) -> Prediction:
    """Return the predicted seconds of a product.

    Args:
        product: the product.
        multiprocessors: multiprocessors of the GPU.
        resident: programs that a multiprocessor runs at the same time.
        kernel: the kernel.
    """
    groups = sum(product.groups.values())
    most = -(-groups // product.split_k)  # groups of the program that has most
    programs = product.blocks * product.split_k
    waits = programs > multiprocessors * resident
    instructions = sum(count * kernel.instructions[width] for width, count in product.groups.items()) / groups
    imbalance = most * product.split_k / groups
    if not waits:
        imbalance *= -(-programs // multiprocessors) * multiprocessors / programs
    stream = max(product.weights * instructions / INSTRUCTIONS_A_SECOND, product.size / BYTES_A_SECOND)
    switches = SWITCH * (len(product.groups) - 1) if kernel.every_width else 0.0
    rounds = -(-product.split_k // kernel.parts_at_once)
    shared = FENCE + REDUCTION * rounds if product.split_k > 1 else 0.0
    return Prediction(
        fixed=LAUNCH + SERIAL_LOADS * LOAD + shared,
        stream=stream * imbalance,
        switches=switches,
        tail=SERIAL_LOADS * LOAD + switches + most * LONE_GROUP if waits else 0.0,
    )


def predict_step(products: Sequence[float], blocks: int, dense_size: int) -> float:
    """Return the predicted seconds of decoding one token, of one text, by a captured graph.

    Args:
        products: seconds of each product of a block.
        blocks: number of blocks.
        dense_size: size of the weights at 16 bits that are read as well, in bytes.
    """
    return blocks * (sum(products) + BLOCK_REST) + dense_size / BYTES_A_SECOND


def predict_lookup() -> float:
    """Return the predicted seconds of a lookup in a packed embedding: a launch, and the loads that it waits for."""
    return LAUNCH + SERIAL_LOADS * LOAD
