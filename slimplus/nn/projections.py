"""Packed layers that read the same input (q, k and v; gate and up), multiplied in one launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slimplus.nn.int4 import Int4Weight
from slimplus.nn.int8 import Int8Weight
from slimplus.nn.packed import PackedLinear, offloading_hook
from slimplus.nn.shards import OLDEST, FusedShards

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that every architecture we know feeds the same tensor."""

Form = Int4Weight | Int8Weight | FusedShards
FORMS: dict[str, tuple[type[Form], ...]] = {"cpu": (Int4Weight, Int8Weight), "cuda": (FusedShards,)}
"""Device → how packed weights are multiplied there while rows are few; which one depends on their widths."""


class Projections:
    """One or more packed layers with the same input.

    The layers stay what they are: each holds its own packed tensors, in its own order of groups, and is called as
    before. The first one called multiplies for all; the others, called with the very same tensor, find their part.

    Args:
        layers: of equal `in_features` and `group_size`.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = tuple(layers)
        self._widths = frozenset(width for layer in layers for width in layer.bit_counts)
        self._form: Form | None = None
        self._pending: tuple[Tensor, int, list[Tensor | None]] | None = None

    def takes(self, dtype: torch.dtype, rows: int) -> bool:
        """Whether so many rows of input are multiplied faster here, in `dtype`, than by dequantized weights."""
        return self._kind(dtype, rows) is not None

    def _kind(self, dtype: torch.dtype, rows: int) -> type[Form] | None:
        if dtype not in (torch.float16, torch.bfloat16):  # wider ones are left to the exact product
            return None
        first = self.layers[0]
        device = first.scales.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
            return None
        forms = FORMS.get(device.type, ())
        return next((form for form in forms if form.takes(rows, self._widths, first.group_size)), None)

    def __call__(self, inputs: Tensor, layer: PackedLinear, dtype: torch.dtype) -> Tensor:
        """Output of one of the layers, computed in `dtype`; see `takes`."""
        position = next(index for index, member in enumerate(self.layers) if member is layer)
        pending = self._pending
        version = _version(inputs)
        if pending is None or pending[0] is not inputs or pending[1] != version or pending[2][position] is None:
            pending = (inputs, version, self._multiply(inputs.to(dtype)))
        parts = pending[2]
        output, parts[position] = parts[position], None
        self._pending = pending if any(part is not None for part in parts) else None
        assert output is not None
        return output

    def linear(self, inputs: Tensor) -> Tensor:
        """`inputs` `[..., in]` → `[..., sum of out]`: the outputs of all the layers side by side; see `takes`."""
        if self._form is None:
            self.prepare()
        assert self._form is not None
        return self._form.linear(inputs)

    def _multiply(self, inputs: Tensor) -> list[Tensor | None]:
        return list(self.linear(inputs).split([layer.out_features for layer in self.layers], dim=-1))

    @torch.compiler.disable
    def prepare(self) -> None:
        """Make the form for the device on which the layers lie; otherwise the first use does."""
        kind = self._kind(torch.bfloat16, rows=1)
        assert kind is not None
        self._form = kind.from_layers(self.layers)

    def warm_up(self, dtype: torch.dtype) -> None:
        """`prepare`, and compile what products of any size with inputs of `dtype` need."""
        self.prepare()
        if isinstance(self._form, FusedShards):
            self._form.warm_up(dtype)
            for layer in self.layers:
                layer.dequantize(dtype)

    @property
    def nbytes(self) -> int:
        """Memory that the form takes beside the packed tensors."""
        return self._form.nbytes if self._form is not None else 0

    def forget(self) -> None:
        """Drop the form: the layers have been moved or changed."""
        self._form = self._pending = None


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where PyTorch counts it."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def prepare_inference(model: nn.Module, fuse: bool = True, keep_dense: bool = False) -> list[Projections]:
    """Give every packed layer of `model` its fast way to multiply; a second call replaces the first.

    Args:
        model: with packed layers, on any device.
        fuse: whether layers that read the same input are multiplied in one launch.
        keep_dense: whether dequantized weights are kept, which makes many rows at once fast on a CPU and takes as much
            memory as the model had before it was quantized.
    """
    made = []
    for parent in model.modules():
        layers = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, PackedLinear) and not _is_offloaded(child)
        }
        for names in _together(layers) if fuse else [(name,) for name in layers]:
            members = [layers[name] for name in names]
            made.append(Projections(members))
            for member in members:
                member.forget()
                member.projections, member.keep_dense = made[-1], keep_dense
    return made


def _is_offloaded(layer: PackedLinear) -> bool:
    """Whether accelerate brings in something of the layer for each of its forwards, and only for these."""
    hook = offloading_hook(layer)
    return hook is not None and (hook.offload_buffers or layer.bias is not None)


def _together(layers: Mapping[str, PackedLinear]) -> list[tuple[str, ...]]:
    """The names of `layers`, those of siblings that can be fused in one tuple."""
    fused = [
        names
        for names in SIBLINGS
        if layers.keys() >= set(names)
        and len({(layers[name].in_features, layers[name].group_size) for name in names}) == 1
    ]
    return fused + [(name,) for name in layers if not any(name in names for names in fused)]
