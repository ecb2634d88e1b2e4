"""A linear layer that keeps its weight bit-packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from slimplus.format.affine import QuantizedWeight
from slimplus.format.checks import check_packed
from slimplus.format.planes import BitCounts, check_features, count_bits, pack, packed_shapes, stored_scale_bits, unpack
from slimplus.nn.backends.triton import dequantized_linear
from slimplus.utils.cpu_speed import product_dtype

KEPT_DENSE_ROWS = 32  # rows of input from which a kept dequantized weight is faster than int4 on a CPU


class _Product(torch.autograd.Function):
    """The product of a packed layer, with the gradients of its inputs and its bias, for adapters trained beside it.

    The weight is frozen. It is dequantized again by the backward pass: if all layers kept their dequantized weights,
    these would take the memory that packing has saved.
    """

    @staticmethod
    def forward(context: Any, inputs: Tensor, bias: Tensor | None, layer: PackedLinear, dtype: torch.dtype) -> Tensor:
        packed = layer.packed_tensors()  # kept themselves: accelerate may take offloaded ones from the layer
        context.save_for_backward(*packed.values())
        context.packed = tuple(packed), layer.bit_counts, layer.shape, layer.group_size
        outputs = layer.product(inputs, dtype)
        return outputs if outputs._base is None else outputs.clone()  # autograd lets nobody change a view in place

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,), (names, bit_counts, shape, group_size) = gradients, context.packed
        of_inputs = of_bias = None
        if context.needs_input_grad[0]:
            packed = dict(zip(names, context.saved_tensors, strict=True))
            dtype = product_dtype(gradient.dtype, gradient.device)
            weight = dequantize_packed(packed, bit_counts, shape, group_size, dtype)
            of_inputs = gradient.to(dtype) @ weight  # autograd casts it to the dtype of the inputs
        if context.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_inputs, of_bias, None, None


def dequantize_packed(
    packed: Mapping[str, Tensor],
    bit_counts: BitCounts,
    shape: tuple[int, int],
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight that packed tensors hold, exact in float32, rounded once to any other dtype.

    Args:
        packed: the tensors of the packed format by name.
        bit_counts: number of groups of each width.
        shape: shape of the weight, `[out, in]`.
        group_size: columns a group.
        dtype: dtype of the result.
    """
    tensors = [packed[name] for name in packed_shapes(shape[0], bit_counts, group_size)]
    return _dequantize(tensors, list(bit_counts), list(bit_counts.values()), *shape, group_size, dtype)


@torch.library.custom_op("slimplus::dequantize", mutates_args=())
def _dequantize(
    tensors: Sequence[Tensor],
    widths: Sequence[int],
    counts: Sequence[int],
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize a weight as one operator for `torch.compile`; the tensors are in the order of `packed_shapes`."""
    bit_counts = dict(zip(widths, counts, strict=True))
    packed = dict(zip(packed_shapes(rows, bit_counts, group_size), tensors, strict=True))
    if packed["scales"].is_cuda:
        from slimplus.kernels.dequantize import dequantize  # Triton, which a machine without a GPU may lack

        with torch.cuda.device_of(packed["scales"]):  # Triton launches on the current device
            return dequantize(packed, bit_counts, rows, columns, group_size, dtype)
    return unpack(packed, rows, columns, group_size).dequantize(dtype)


@_dequantize.register_fake
def _(
    tensors: Sequence[Tensor],
    widths: Sequence[int],
    counts: Sequence[int],
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    if tensors[0].is_cuda:
        return tensors[0].new_empty(rows, columns, dtype=dtype)
    return tensors[0].new_empty(columns, rows, dtype=dtype).T


class PackedModule(nn.Module):
    """A module whose buffers are the tensors of a packed weight."""

    def packed_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the packed format by name."""
        return dict(self.named_buffers(recurse=False))

    def replace_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the packed tensors by others of the same values, such as views of fused tensors."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        """Apply `function` as `nn.Module` does; packed tensors move to other devices but keep their dtypes."""
        packed = {id(buffer) for buffer in self.buffers()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = function(tensor)
            return tensor.to(moved.device) if id(tensor) in packed and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)


class FusedProduct(Protocol):
    """What multiplies for a packed layer, alone or together with layers that read the same input.

    `slimplus.nn.fusion.FusedLinears` is the implementation.
    """

    def supports(self, dtype: torch.dtype, rows: int) -> bool:
        """Return whether `rows` rows of input are multiplied in `dtype`."""

    def __call__(self, inputs: Tensor, layer: PackedLinear, dtype: torch.dtype) -> Tensor:
        """Return the output of `layer` for `inputs` `[..., in]`, computed in `dtype`."""

    def forget(self) -> None:
        """Drop everything that was derived from the packed tensors."""

    @property
    def weight(self) -> object | None:
        """What the device multiplies by, if it is made; another object after the layers have changed."""

    @property
    def nbytes(self) -> int:
        """Memory held beside the packed tensors, in bytes."""


@dataclass(frozen=True)
class WeightDescription:
    """What code of a model may ask of a layer's weight without using its values.

    Attributes:
        shape: shape of the weight, `[out, in]`.
        dtype: dtype that the weight is computed in where the inputs do not decide.
        device: device of the packed tensors.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False
    _is_hf_initialized: bool = True  # by which transformers gives no random values to a weight

    def dim(self) -> int:
        """Return the number of dimensions, 2."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of weights."""
        return self.shape.numel()


class PackedLinear(PackedModule):
    """`nn.Linear` over the packed format of `slimplus.format.planes`, whose weight is frozen.

    After `prepare_inference`, few rows of input are multiplied by `fused`: by Triton kernels on a GPU, by PyTorch's
    weight-only operators on a CPU. Otherwise the forward dequantizes the whole weight to the dtype of the input (on a
    CPU that emulates it, to float32) and uses PyTorch's matmul.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        group_size: columns a group.
        bit_counts: number of groups of each width; it fixes the shape of every buffer.
        bias: whether the layer has a bias.
        dtype: dtype of the bias, and the one that `weight` tells; None takes PyTorch's default.
        scale_bits: bits that a scale takes, 8 or 16.

    Attributes:
        fused: product of this layer and those with the same input, or None before `prepare_inference`.
        keep_dense: whether the dequantized weight is kept after its first use.

    Raises:
        ValueError: if `bit_counts` does not describe `in_features` columns.
    """

    scales: Tensor
    fused: FusedProduct | None = None
    keep_dense: bool = False
    _dense: Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bit_counts: Mapping[int, int],
        bias: bool = False,
        dtype: torch.dtype | None = None,
        scale_bits: int = 16,
    ) -> None:
        super().__init__()
        check_features(in_features, bit_counts, group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.bit_counts, self.dtype = dict(bit_counts), dtype or torch.get_default_dtype()
        for name, (shape, tensor_dtype) in packed_shapes(out_features, bit_counts, group_size, scale_bits).items():
            self.register_buffer(name, torch.zeros(shape, dtype=tensor_dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None) -> Self:
        """Return a layer on the CPU with the packed `weight`; the bias `[out]` keeps its dtype."""
        out_features, in_features = weight.integers.shape
        tensors = pack(weight)
        if bias is not None:
            tensors["bias"] = bias.detach().cpu()
        return cls.from_tensors(tensors, in_features, out_features, weight.group_size)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], in_features: int, out_features: int, group_size: int) -> Self:
        """Return a layer that holds the tensors of a packed weight, and a `bias` if they include one.

        Args:
            tensors: the tensors of the packed format by name.
            in_features: columns of the weight.
            out_features: rows of the weight.
            group_size: columns a group.

        Raises:
            ValueError: naming the tensor, if the tensors are not a packed weight of this shape.
        """
        check_packed(tensors, (out_features, in_features), group_size)
        if (bias := tensors.get("bias")) is not None and bias.shape != (out_features,):
            raise ValueError(f"bias is {list(bias.shape)} instead of [{out_features}]")
        counts, scale_bits = count_bits(tensors["group_bits"]), stored_scale_bits(tensors)
        with torch.device("meta"):
            layer = cls(in_features, out_features, group_size, counts, "bias" in tensors, scale_bits=scale_bits)
        layer.load_state_dict(dict(tensors), assign=True)
        if layer.bias is not None:
            layer.dtype = layer.bias.dtype
        return layer.requires_grad_(False)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, `[out, in]`."""
        return self.out_features, self.in_features

    @property
    def qweight(self) -> Tensor:
        """Packed integers of the widest plane, under the name by which PEFT finds a quantized layer's device."""
        return next(tensor for name, tensor in reversed(self.packed_tensors().items()) if name.startswith("qplane"))

    @property
    def weight(self) -> WeightDescription:
        """The shape, dtype and device of the weight, for code that asks for them; it holds no values.

        `dequantize` returns the values.
        """
        return WeightDescription(torch.Size(self.shape), self.dtype, self.scales.device)

    def quantized_weight(self) -> QuantizedWeight:
        """Return the integers, scales and zero points, in the original order of columns."""
        return unpack(self.packed_tensors(), self.out_features, self.in_features, self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `[out, in]`, exact in float32, rounded once to any other dtype."""
        return dequantize_packed(self.packed_tensors(), self.bit_counts, self.shape, self.group_size, dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return an ordinary layer of `dtype` with the same weight and bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        tensors = {"weight": self.dequantize(dtype)}
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().to(dtype)
        linear.load_state_dict(tensors, assign=True)
        return linear.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply `inputs` `[..., in]` by the weight, `[..., out]`, in their dtype or in that of autocast.

        Inputs and bias get gradients if they require them; the weight has none.

        Raises:
            ValueError: if the inputs do not have `in_features` columns.
        """
        if inputs.shape[-1] != self.in_features:
            raise ValueError(f"the inputs have {inputs.shape[-1]} columns, but this layer takes {self.in_features}")
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        if torch.is_grad_enabled() and (inputs.requires_grad or self._trains_bias):
            outputs: Tensor = _Product.apply(inputs, self.bias, self, dtype)
            return outputs
        with torch.no_grad():
            return self.product(inputs, dtype)

    @property
    def _trains_bias(self) -> bool:
        return self.bias is not None and self.bias.requires_grad

    def product(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply `inputs` `[..., in]` by the weight in `dtype`, `[..., out]`, without gradients."""
        rows = inputs.numel() // self.in_features
        kept = self.keep_dense and rows >= KEPT_DENSE_ROWS
        if self._trains_bias:
            self.forget()  # backends copy the bias
        elif self.fused is not None and rows and not kept and self.fused.supports(dtype, rows):
            return self.fused(inputs, self, dtype)
        multiplied = product_dtype(dtype, inputs.device)
        bias = None if self.bias is None else self.bias.to(multiplied)
        if inputs.is_cuda and rows and not self.keep_dense:
            return self._sliced_product(inputs.to(multiplied), bias).to(dtype)
        return nn.functional.linear(inputs.to(multiplied), self._dense_weight(multiplied), bias).to(dtype)

    def _sliced_product(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply on a GPU without the whole dequantized weight, see `dequantized_linear`."""
        packed = self.packed_tensors()
        outputs: Tensor = dequantized_linear(
            inputs.reshape(-1, self.in_features),
            [packed[name] for name in packed_shapes(self.out_features, self.bit_counts, self.group_size)],
            list(self.bit_counts),
            list(self.bit_counts.values()),
            self.out_features,
            self.group_size,
            bias,
        )
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, from the last call if it was kept in this dtype."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        weight = self.dequantize(dtype)
        if self.keep_dense:
            self._dense = weight
        return weight

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        self.forget()
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype  # a cast changes it as it changes a dense weight
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*arguments, **options)

    def forget(self) -> None:
        """Drop everything that was derived from the packed tensors: they have moved or changed."""
        self._dense = None
        if self.fused is not None:
            self.fused.forget()

    def extra_repr(self) -> str:
        """Return the sizes and widths that `repr` of the module shows."""
        widths = ", ".join(f"{count}×{width}-bit" for width, count in self.bit_counts.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, groups=({widths}), bias={self.bias is not None}"
        )


def offloading_hook(layer: nn.Module) -> Any:
    """Return the hook of accelerate that loads the layer's offloaded tensors for each forward, or None."""
    hook = getattr(layer, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)), None)
