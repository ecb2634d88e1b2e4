"""Linear layers quantized without a recipe: one weight or layer, or all linear layers of a module.

Both functions go the way of a transformer block in a recipe's run, without training:

1. The inputs of a layer give its Hessian (`slimplus.quantization.salience`).
2. The inverse of that gives the salience of each group of columns.
3. By salience, groups get one bit less or one more than the average (SBA, `salience_allocation`).
4. Scale and zero point of each group are calibrated (SQC, `salience_calibration`), and rounding errors compensated
   (GPTQ, `gptq`).
5. The integers are packed (`slimplus.format.planes`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from slimplus.format.affine import MAX_BITS, SCALE_BITS, group_count, uniform_bits
from slimplus.format.planes import COLUMNS_PER_CONTAINER
from slimplus.nn.fusion import prepare_inference
from slimplus.nn.packed_linear import PackedLinear
from slimplus.quantization import linear
from slimplus.quantization.linear import QuantizationConfig
from slimplus.quantization.salience import HessianAccumulator, group_salience, invert_hessian
from slimplus.quantization.salience_allocation import SEARCH_TOKENS, allocate_bits
from slimplus.utils.errors import InputError

Method = Literal["rtn", "gptq", "slimllm"]
Allocation = Literal["uniform", "slimllm"]
ModuleType = TypeVar("ModuleType", bound=nn.Module)

METHODS, ALLOCATIONS = get_args(Method), get_args(Allocation)


class _Calibration:
    """What is kept of the inputs of one linear layer: their Hessian, and the first tokens for the search of widths.

    Args:
        weight: the layer's weight, `[out, in]`.

    Attributes:
        search: batches of `[tokens, in]`, float32.
    """

    def __init__(self, weight: Tensor) -> None:
        self._device, self._columns = weight.device, weight.shape[1]
        self._sum = HessianAccumulator(self._columns, weight.device)
        self.search: list[Tensor] = []
        self._room = SEARCH_TOKENS

    def __bool__(self) -> bool:
        return self._sum.tokens > 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs `[..., in]`.

        Raises:
            InputError: for inputs of another width.
        """
        if not inputs.dim() or inputs.shape[-1] != self._columns:
            raise InputError(f"inputs: {list(inputs.shape)} does not end in the {self._columns} columns of the weight")
        flat = inputs.detach().reshape(-1, self._columns).to(self._device, torch.float32)
        self._sum.add(flat)
        if self._room > 0:
            self.search.append(flat[: self._room].clone())  # a view would keep all of the inputs
            self._room -= len(self.search[-1])

    def hessian(self) -> Tensor:
        """Return the Hessian `[in, in]`, float32.

        Raises:
            InputError: if NaN or infinity is among the inputs.
        """
        hessian = self._sum.hessian
        if not hessian.diagonal().isfinite().all():
            raise InputError("inputs: there is NaN or infinity among them; give finite ones")
        return hessian


@torch.no_grad()
def quantize_linear(
    layer: nn.Linear | Tensor,
    inputs: Tensor | Iterable[Tensor] | None = None,
    bits: int = 2,
    *,
    group_size: int = 128,
    method: Method = "slimllm",
    allocation: Allocation | Sequence[int] | Tensor | None = None,
    percdamp: float = 0.01,
    scale_bits: int = 16,
) -> PackedLinear:
    """Quantize one linear layer, or a weight, and pack it.

    ```python
    packed = slimplus.quantize_linear(layer, activations, bits=2)
    packed(x)                 # as layer(x), on the same device
    packed.bit_counts         # width -> number of groups that have it
    packed.quantized_weight() # integers, scales, zero points
    ```

    Args:
        layer: the layer, or its weight `[out, in]`; it is not changed.
        inputs: what the layer reads: `[..., in]`, or batches of that. Not needed by `rtn` with equal widths.
        bits: average width; ignored where `allocation` gives the widths.
        group_size: columns a group, a multiple of 16.
        method: `rtn` (round to nearest), `gptq` (with error compensation) or `slimllm` (with calibrated grids as well).
        allocation: `uniform`, `slimllm` (by salience, a bit less or more around the average) or the width of each
            group, `[groups]`; None is `slimllm` for the method of that name, else `uniform`.
        percdamp: damping of the Hessian, as a share of its mean diagonal.
        scale_bits: 8 or 16, the bits of a stored scale.

    Returns:
        A layer for inference, with the bias of `layer` if it has one, on the same device.

    Raises:
        InputError: naming the argument that is wrong.
    """
    if not isinstance(layer, Tensor | nn.Linear):
        raise InputError(f"layer: expected an nn.Linear or its weight, got {type(layer).__name__}")
    weight, bias = (layer, None) if isinstance(layer, Tensor) else (layer.weight, layer.bias)
    if weight.dim() != 2:
        raise InputError(f"layer: expected a weight [out, in], got {list(weight.shape)}")
    search: Allocation | None = "uniform"  # does not matter where the widths are given
    if allocation is None or isinstance(allocation, str):
        search, allocation = allocation, None
    config = _config(bits, group_size, method, search, percdamp, scale_bits)
    widths = None if allocation is None else _given_widths(allocation, weight, group_size)
    calibration = _Calibration(weight)
    if inputs is not None:
        for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
            calibration.add(batch)
    if not calibration and _needs_inputs(config):
        raise InputError(f"inputs: method={method!r} with allocation={config.allocation!r} needs those of the layer")
    packed = _quantize(weight, bias, calibration, config, widths)
    prepare_inference(nn.ModuleList([packed]))
    return packed


@torch.no_grad()
def quantize_module(
    module: ModuleType,
    batches: Iterable[Any] | None = None,
    bits: int = 2,
    *,
    group_size: int = 128,
    method: Method = "slimllm",
    allocation: Allocation | None = None,
    skip: Collection[str] = (),
    percdamp: float = 0.01,
    scale_bits: int = 16,
) -> ModuleType:
    """Return a copy of a module whose linear layers are quantized and packed.

    The batches run through the full-precision module once, in evaluation mode; what each layer then reads is what it is
    calibrated on. Kept are, for each layer, `8 in²` bytes and the first 8192 tokens in float32: a whole language model
    is better quantized block by block, by `slimplus.quantize`.

    ```python
    packed = slimplus.quantize_module(block, batches, bits=3, skip=["head"])
    ```

    Args:
        module: any module; it is not changed. Only layers of the very class `nn.Linear` are quantized, since a subclass
            may use its weight in another way.
        batches: what to call the module with: a tuple or list gives its arguments, a mapping its keyword arguments,
            anything else its only argument. A single tensor or mapping is one batch. Not needed by `rtn` with equal
            widths.
        bits: average width in each layer.
        group_size: columns a group, a multiple of 16.
        method: see `quantize_linear`.
        allocation: `uniform` or `slimllm`; see `quantize_linear`.
        skip: names of linear layers to leave as they are.
        percdamp: damping of the Hessian, as a share of its mean diagonal.
        scale_bits: 8 or 16, the bits of a stored scale.

    Raises:
        InputError: naming the argument that is wrong, or the layer that cannot be quantized.
    """
    config = _config(bits, group_size, method, allocation, percdamp, scale_bits)
    layers = {name: child for name, child in module.named_modules() if type(child) is nn.Linear}
    if unknown := sorted(set(skip) - set(layers)):
        raise InputError(f"skip: no linear layer is called {unknown[0]!r}; there are {', '.join(layers)}")
    layers = {name: layer for name, layer in layers.items() if name not in skip}
    if not layers:
        raise InputError("module: it has no linear layer to quantize")
    calibrations = {name: _Calibration(layer.weight) for name, layer in layers.items()}
    if batches is not None:
        with _recorded(layers, calibrations), _evaluating(module):
            for batch in [batches] if isinstance(batches, Tensor | Mapping) else batches:
                _call(module, batch)
    if _needs_inputs(config) and (unread := [name for name, calibration in calibrations.items() if not calibration]):
        raise InputError(f"batches: none has reached {unread[0]}; give some that do, or name it in skip")
    packed: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        try:
            packed[id(layer)] = _quantize(layer.weight, layer.bias, calibrations.pop(name), config, None)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    copy = deepcopy(module, packed)  # which takes a layer's packed one for a copy that it has made already
    prepare_inference(nn.ModuleList([copy]))
    return copy


def _config(
    bits: int, group_size: int, method: Method, allocation: Allocation | None, percdamp: float, scale_bits: int
) -> QuantizationConfig:
    """Return how weights are quantized.

    Raises:
        InputError: naming the argument that is wrong.
    """
    if method not in METHODS:
        raise InputError(f"method: expected {', '.join(METHODS)}, got {method!r}; the others train, in a recipe's run")
    search: Allocation = allocation or ("slimllm" if method == "slimllm" else "uniform")
    if search not in ALLOCATIONS:
        raise InputError(f"allocation: expected {', '.join(ALLOCATIONS)} or the width of each group, got {search!r}")
    least, most = (2, MAX_BITS - 1) if search == "slimllm" else (1, MAX_BITS)
    if not isinstance(bits, int) or not least <= bits <= most:
        raise InputError(f"bits: expected {least} to {most} with allocation={search!r}, got {bits!r}")
    if not isinstance(group_size, int) or group_size < 1 or group_size % COLUMNS_PER_CONTAINER:
        raise InputError(f"group_size: expected a multiple of {COLUMNS_PER_CONTAINER}, got {group_size!r}")
    if scale_bits not in SCALE_BITS:
        raise InputError(f"scale_bits: expected {' or '.join(map(str, SCALE_BITS))}, got {scale_bits!r}")
    if not 0 < percdamp <= 1:
        raise InputError(f"percdamp: expected a number above 0 and at most 1, got {percdamp!r}")
    return QuantizationConfig(method, bits, group_size, percdamp, search, scale_bits=scale_bits)


def _needs_inputs(config: QuantizationConfig) -> bool:
    """Return whether a layer's inputs decide anything: rounding to nearest looks at none, a search for widths does."""
    return config.method != "rtn" or config.allocation == "slimllm"


def _given_widths(allocation: Sequence[int] | Tensor, weight: Tensor, group_size: int) -> Tensor:
    """Return the widths `[groups]`, int32.

    Raises:
        InputError: if they are not one of 1 to 8 for each group.
    """
    widths, groups = torch.as_tensor(allocation).cpu(), group_count(weight.shape[1], group_size)
    if widths.shape != (groups,) or widths.is_floating_point() or not ((widths >= 1) & (widths <= MAX_BITS)).all():
        raise InputError(
            f"allocation: expected {groups} widths from 1 to {MAX_BITS}, one for each group of {group_size} columns, "
            f"got {widths.tolist()}"
        )
    return widths.to(torch.int32)


def _quantize(
    weight: Tensor, bias: Tensor | None, calibration: _Calibration, config: QuantizationConfig, widths: Tensor | None
) -> PackedLinear:
    """Quantize a weight `[out, in]` to `widths` `[groups]`, which are found by its inputs if they are None."""
    rows, columns = weight.shape
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise InputError("the weight holds NaN or infinity; give finite weights")
    hessian = torch.eye(columns, device=weight.device) if config.method == "rtn" else calibration.hessian()
    inverse = invert_hessian(hessian, config.percdamp)
    if widths is None and config.allocation == "slimllm":
        salience = group_salience(weight, inverse, config.group_size)
        widths = allocate_bits(weight, salience, calibration.search, config.bits, config.group_size)
    elif widths is None:
        widths = uniform_bits(columns, config.group_size, config.bits)
    rounded = linear.round_weight(weight, widths, hessian, inverse, config)
    return PackedLinear.from_quantized(rounded.weight, bias).to(weight.device)


@contextmanager
def _recorded(layers: Mapping[str, nn.Linear], calibrations: Mapping[str, _Calibration]) -> Iterator[None]:
    """Within this context the inputs of each layer are added to its calibration."""
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, calibration=calibrations[name]: calibration.add(inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within this context the module is in evaluation mode."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def _call(module: nn.Module, batch: Any) -> None:
    """Run a module on one batch."""
    if isinstance(batch, Mapping):
        module(**batch)
    elif isinstance(batch, tuple | list):
        module(*batch)
    else:
        module(batch)
