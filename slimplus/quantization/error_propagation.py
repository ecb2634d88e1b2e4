"""Asymmetric calibration: a layer's weight makes up for what the quantized layers before it did to its inputs.

GPTQ and SliM-LLM approximate the output `W x̂` that a layer would have on the inputs `x̂` which the quantized layers
before it give. The output that is wanted is `W x`, on the inputs `x` of the full-precision model. With the Hessian
`H = Σ x̂ x̂ᵀ` and the cross product `C = Σ (x - x̂) x̂ᵀ`,

    Σ |W x - Q x̂|² = tr (W' - Q) H (W' - Q)ᵀ + constant,    W' = W (I + C H⁻¹),

so that every method that approximates a weight serves as it is, once it is given `W'` (quantization error propagation,
QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692, moves the columns of GPTQ to the same end).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimplus.quantization.salience import HessianAccumulator, InverseHessian


class PairedAccumulator(HessianAccumulator):
    """Running Hessian of a layer's inputs behind quantized layers, and their cross product with what they should be.

    Args:
        in_features: columns of the layer's weight.
        device: device of the sums.

    Attributes:
        cross: the sum `Σ (x - x̂) x̂ᵀ`, `[in, in]`, float64; those of several ranks can be added.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.cross = torch.zeros_like(self.total)

    def add_pair(self, full: Tensor, quantized: Tensor) -> None:
        """Add tokens: the inputs `x` in full precision, `[..., in]`, and `x̂` behind quantized layers."""
        self.add(quantized)
        with torch.autocast(quantized.device.type, enabled=False):
            own = quantized.reshape(-1, quantized.shape[-1]).float()
            self.cross += (full.reshape(own.shape).float() - own).T @ own

    @property
    def cross_product(self) -> Tensor:
        """The cross product on the Hessian's scale, `2/N Σ (x - x̂) x̂ᵀ`, `[in, in]`, float32."""
        return (self.cross * (2 / max(self.tokens, 1))).float()


def compensated_weight(weight: Tensor, cross: Tensor, inverse: InverseHessian, strength: float) -> Tensor:
    """Return the weight `W (I + strength · C H⁻¹)` to approximate in place of `W`, `[out, in]`.

    Args:
        weight: the full-precision weight `W`, `[out, in]`.
        cross: `PairedAccumulator.cross_product`.
        inverse: inverse of the damped Hessian `H`.
        strength: share of the error that is made up for, from 0 to 1 (QEP's α). A part of it belongs to the few
            calibration tokens alone, and a fit to all of it would not hold for others.
    """
    step = (weight @ cross) @ inverse.upper.T
    return torch.addmm(weight, step, inverse.upper, alpha=strength)
