"""Quantize a module that is no language model, and look at the pieces on one of its layers.

python examples/own_module.py
"""

from __future__ import annotations

import torch
from torch import nn

import slimplus


def main() -> None:
    """Quantize a small network, then one layer of it step by step."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 512)
    network = nn.Sequential(layer, nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    spread = torch.linspace(0.1, 3, 256)  # of the input columns: some matter more than others
    batches = [torch.randn(64, 256) * spread for _ in range(64)]
    unseen = torch.randn(64, 256) * spread

    # All layers but the last one; `network` stays as it is.
    packed = slimplus.quantize_module(network, batches, bits=3, group_size=64, skip=["4"])
    error = (packed(unseen) - network(unseen)).norm() / network(unseen).norm()
    print(f"module at 3 bits: relative error {error:.3f}")

    # One layer, from what it reads.
    for allocation in ("uniform", "slimllm"):
        one = slimplus.quantize_linear(layer, batches, bits=2, group_size=32, allocation=allocation)
        error = (one(unseen) - layer(unseen)).norm() / layer(unseen).norm()
        print(f"layer at 2 bits, {allocation}: relative error {error:.3f}, groups of each width {one.bit_counts}")

    # The same piece by piece, on a weight.
    weight = layer.weight.detach()
    hessian = slimplus.HessianAccumulator(weight.shape[1], weight.device)
    for batch in batches:
        hessian.add(batch)
    salience = slimplus.group_salience(weight, slimplus.invert_hessian(hessian.hessian), group_size=32)
    widths = slimplus.allocate_bits(weight, salience, batches, target_bits=2, group_size=32)
    print(f"widths by salience: {widths.tolist()}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
