"""Packed layers that read the same input (q, k and v; gate and up), multiplied in one launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimplus.nn.backends.cpu_int4 import Int4Weight
from slimplus.nn.backends.cpu_int8 import Int8Weight
from slimplus.nn.backends.triton import OLDEST, TritonWeight
from slimplus.nn.packed_linear import PackedLinear, offloading_hook

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of the layers in a module that all supported architectures call with the same input."""

Backend = Int4Weight | Int8Weight | TritonWeight
BACKENDS: dict[str, tuple[type[Backend], ...]] = {"cpu": (Int4Weight, Int8Weight), "cuda": (TritonWeight,)}
"""Backends of each type of device, for few rows of input; the first one that supports the widths is taken."""


WAITING = "_slimplus_waiting"
"""Name of a tensor's attribute that holds the parts of its product for which no layer has called yet."""


@dataclass(frozen=True)
class _Waiting:
    """Parts of a product that wait for their layers' calls.

    Attributes:
        source: the weight, the dtype, and the version of the input.
        parts: outputs by the positions of their layers.
    """

    source: tuple[object, torch.dtype, int]
    parts: dict[int, Tensor]


class FusedLinears:
    """One or more packed layers that read the same input, multiplied together.

    Each layer keeps its own packed tensors, in its own order of groups, and is called on its own. The first call
    multiplies for all the layers; the others, called with the very same tensor, get their part of that product. Parts
    that nobody has called for yet wait on the input itself, as an attribute: they live no longer than it does, and a
    graph that `torch.compile` makes of the calls neither reads nor leaves anything outside.

    Args:
        layers: packed layers with the same `in_features` and `group_size`.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = tuple(layers)
        self._widths = frozenset(width for layer in layers for width in layer.bit_counts)
        self._backend: Backend | None = None
        self._source = object()  # which weight waiting parts come from

    def supports(self, dtype: torch.dtype, rows: int) -> bool:
        """Return whether a backend multiplies `rows` rows in `dtype` faster than a dequantized weight does."""
        return self._backend_type(dtype, rows) is not None

    def _backend_type(self, dtype: torch.dtype, rows: int) -> type[Backend] | None:
        """Return the backend for `rows` rows of input in `dtype`, or None where a dequantized weight is better."""
        if dtype not in (torch.float16, torch.bfloat16):  # float32 keeps the exact product
            return None
        first = self.layers[0]
        device = first.scales.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
            return None
        backends = BACKENDS.get(device.type, ())
        return next((backend for backend in backends if backend.supports(rows, self._widths, first.group_size)), None)

    def __call__(self, inputs: Tensor, layer: PackedLinear, dtype: torch.dtype) -> Tensor:
        """Return the output of one of the layers for `inputs` `[..., in]`, computed in `dtype`.

        `supports` must hold for the dtype and the rows of the inputs.
        """
        if len(self.layers) == 1:
            return self.linear(inputs.to(dtype))
        position = next(index for index, member in enumerate(self.layers) if member is layer)
        source = (self._source, dtype, _version(inputs))
        waiting: _Waiting | None = getattr(inputs, WAITING, None)
        if waiting is None or waiting.source != source or position not in waiting.parts:
            waiting = _Waiting(source, dict(enumerate(self._multiply(inputs.to(dtype)))))
            setattr(inputs, WAITING, waiting)
        output = waiting.parts.pop(position)
        if not waiting.parts:
            setattr(inputs, WAITING, None)  # `torch.compile` cannot delete an attribute of a tensor
        return output

    def linear(self, inputs: Tensor) -> Tensor:
        """Return the outputs of all the layers side by side, `[..., sum of out]`, for `inputs` `[..., in]`.

        `supports` must hold for the dtype and the rows of the inputs.
        """
        if self._backend is None:
            self.prepare()
        assert self._backend is not None
        return self._backend.linear(inputs)

    def _multiply(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer."""
        return self.linear(inputs).split([layer.out_features for layer in self.layers], dim=-1)

    @torch.compiler.disable
    def prepare(self) -> None:
        """Make the backend's weight on the device of the layers; otherwise the first product does."""
        backend_type = self._backend_type(torch.bfloat16, rows=1)
        assert backend_type is not None
        if issubclass(backend_type, TritonWeight):
            self._backend = triton_weight(self.layers)
        else:
            weights = [layer.quantized_weight() for layer in self.layers]
            self._backend = backend_type.from_quantized(weights, _stacked_bias(self.layers))

    def warm_up(self, dtype: torch.dtype) -> None:
        """Prepare the backend, and compile its kernels for inputs of `dtype` with any number of rows."""
        self.prepare()
        if isinstance(self._backend, TritonWeight):
            self._backend.warm_up(dtype)
            for layer in self.layers:
                layer.dequantize(dtype)

    @property
    def weight(self) -> Backend | None:
        """What the device multiplies by; None before the first product, another one after a change of the layers."""
        return self._backend

    @property
    def nbytes(self) -> int:
        """Memory that the backend takes beside the packed tensors, in bytes."""
        return self._backend.nbytes if self._backend is not None else 0

    def forget(self) -> None:
        """Drop the backend's weight, and parts that wait for a call: the layers have been moved or changed."""
        self._backend, self._source = None, object()


def triton_weight(layers: Sequence[PackedLinear]) -> TritonWeight:
    """Lay the packed tensors of layers with the same input end to end; the layers' own tensors become views of them."""
    weight, views = TritonWeight.from_packed(
        [layer.packed_tensors() for layer in layers],
        [layer.bit_counts for layer in layers],
        [layer.shape for layer in layers],
        layers[0].group_size,
        _stacked_bias(layers),
    )
    for layer, tensors in zip(layers, views, strict=True):
        layer.replace_tensors(tensors)
    return weight


def _stacked_bias(layers: Sequence[PackedLinear]) -> Tensor | None:
    """Return the layers' biases end to end, `[sum of out]`, zeros for a layer without one; None if there is none."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [
            layer.scales.new_zeros(layer.out_features, dtype=torch.float32)
            if layer.bias is None
            else layer.bias.detach()
            for layer in layers
        ]
    )


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place, where PyTorch counts that; otherwise 0."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def prepare_inference(model: nn.Module, fuse: bool = True, keep_dense: bool = False) -> list[FusedLinears]:
    """Give every packed layer of `model` its fast way to multiply; a second call replaces the first.

    Args:
        model: a model with packed layers, on any device.
        fuse: whether layers that read the same input are multiplied in one launch.
        keep_dense: whether dequantized weights are kept, which makes many rows at once fast on a CPU and takes as much
            memory as the model had before it was quantized.

    Returns:
        The fused layers, one entry for each product.
    """
    products = []
    for parent in model.modules():
        layers = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, PackedLinear) and not _is_offloaded(child)
        }
        for names in _group_siblings(layers) if fuse else [(name,) for name in layers]:
            members = [layers[name] for name in names]
            products.append(FusedLinears(members))
            for member in members:
                member.forget()
                member.fused, member.keep_dense = products[-1], keep_dense
    return products


def _is_offloaded(layer: PackedLinear) -> bool:
    """Return whether accelerate loads tensors of the layer for each of its forwards and drops them afterwards."""
    hook = offloading_hook(layer)
    return hook is not None and (hook.offload_buffers or layer.bias is not None)


def _group_siblings(layers: Mapping[str, PackedLinear]) -> list[tuple[str, ...]]:
    """Return the names of `layers`, those of siblings that can be fused in one tuple, all others alone."""
    fused = [
        names
        for names in SIBLINGS
        if layers.keys() >= set(names)
        and len({(layers[name].in_features, layers[name].group_size) for name in names}) == 1
    ]
    return fused + [(name,) for name in layers if not any(name in names for names in fused)]
