"""Linear layers that learn their grid over integers that stay packed, for the training of a whole model."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from slimplus.distributed.ranks import Ranks
from slimplus.format.affine import QuantizedWeight
from slimplus.format.planes import packed_shapes, unpack_integers
from slimplus.nn.fake_quantized import FakeQuantizedLinear, ScaledLinear
from slimplus.nn.packed_linear import PackedLinear

ALONE = Ranks()
UNPACKED = "integers"


class _Product(torch.autograd.Function):
    """The product of inputs and the levels of packed integers, which the backward pass unpacks again.

    What is kept in between are the inputs and the grid, nothing of the weight's size. The operators are those that
    autograd takes for `FakeQuantizedLinear`, in their order, and so are the bits of the gradients.
    """

    @staticmethod
    def forward(
        context: Any, inputs: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, layer: _PackedIntegers
    ) -> Tensor:
        context.save_for_backward(inputs, scale, zero_point)
        context.layer = layer
        levels = (layer.integers - zero_point).mul_(scale)
        return nn.functional.linear(inputs, layer.flattened(levels).to(inputs.dtype), bias)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (gradient,), (inputs, scale, zero_point), layer = gradients, context.saved_tensors, context.layer
        steps = layer.integers - zero_point
        of_inputs = of_scale = of_zero_point = None
        if context.needs_input_grad[0]:
            of_inputs = gradient @ layer.flattened(steps * scale).to(inputs.dtype)
        if context.needs_input_grad[1]:
            of_weight = (inputs.flatten(0, -2).t() @ gradient.flatten(0, -2)).t()
            of_levels = layer.grouped(of_weight.to(scale.dtype))
            of_scale = steps.mul_(of_levels).sum(-1, keepdim=True)
            if context.needs_input_grad[2]:
                of_zero_point = -(of_levels * scale).sum(-1, keepdim=True)
        return of_inputs, of_scale, of_zero_point, None, None


class _PackedIntegers(FakeQuantizedLinear):
    """Base of the layers whose frozen integers stay packed.

    Args:
        layer: the packed layer.
        ranks: the processes of the job.
        owner: the process that alone holds the planes, and sends them whenever the layer is used, forwards and
            backwards, for which all processes must use their layers in the same order; None if each holds them.
        unpacked: whether to hold the integers unpacked instead, a byte each, which takes less time; only without an
            owner.
    """

    def __init__(
        self, layer: PackedLinear, ranks: Ranks = ALONE, owner: int | None = None, unpacked: bool = False
    ) -> None:
        super().__init__(layer.quantized_weight(), layer.bias)
        self._ranks, self._owner = ranks, owner
        shapes = packed_shapes(layer.out_features, layer.bit_counts, layer.group_size)
        self._planes = {name: shape for name, shape in shapes.items() if name.startswith("qplane")}
        kept = {"group_index", "group_bits"} | (self._planes.keys() if owner in (None, ranks.rank) else set())
        # A dictionary hides them from PyTorch, since the processes of a job may hold different ones.
        self._packed = {name: tensor for name, tensor in layer.packed_tensors().items() if name in kept}
        if unpacked:
            self._packed = {UNPACKED: self.integers}  # in the layout that unpacking gives, and so to the same bits

    def _hold(self, weight: QuantizedWeight) -> None:
        """Keep nothing of the weight, since its packed integers are kept."""

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        device = function(torch.empty(0, device=self.scale.device)).device
        self._packed.update({name: tensor.to(device) for name, tensor in self._packed.items()})
        return super()._apply(function, recurse)

    @property
    def integers(self) -> Tensor:  # type: ignore[override]
        """The integers `[out, groups, group_size]`, uint8, unpacked anew each time unless they are held so."""
        packed = self._packed
        if UNPACKED in packed:
            return packed[UNPACKED]
        if self._owner is not None:
            packed = packed | {name: self._received(name) for name in self._planes}
        return self.grouped(unpack_integers(packed, self.out_features, self.in_features, self.group_size))

    def _received(self, name: str) -> Tensor:
        """Return a plane that the owner has sent, on every process."""
        shape, dtype = self._planes[name]
        plane = self._packed.get(name)
        if plane is None:
            plane = torch.empty(shape, dtype=dtype, device=self.scale.device)
        assert self._owner is not None
        self._ranks.send(self._owner, plane.view(torch.uint8))  # NCCL knows no int16
        return plane

    def flattened(self, weight: Tensor) -> Tensor:
        """Reshape values `[out, groups, group_size]` to `[out, in]`."""
        return weight.flatten(1)[:, : self.in_features]

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]` by the fake-quantized weight, `[..., out]`."""
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        scale, zero_point = (values[..., None] for values in self.qparams())
        bias = None if self.bias is None else self.bias.to(dtype)
        return cast(Tensor, _Product.apply(inputs.to(dtype), scale, zero_point, bias, self))


class PackedGridLinear(_PackedIntegers):
    """`FakeQuantizedLinear` over integers that stay packed; it takes the arguments of its base."""


class PackedScaledLinear(_PackedIntegers, ScaledLinear):
    """`ScaledLinear` over integers that stay packed; it takes the arguments of its base."""
