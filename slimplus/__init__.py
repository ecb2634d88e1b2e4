"""slimplus: salience-driven mixed-precision quantization of language models (SliM-LLM, arXiv 2405.14917).

`import slimplus` makes transformers load packed checkpoints: `AutoModelForCausalLM.from_pretrained(path)`. It imports
nothing heavy: the names below are imported when they are first used.

| names | what for |
|---|---|
| `quantize`, `QuantizationResult` | quantize a language model as a recipe says |
| `load` | load a packed checkpoint |
| `GraphDecoder` | text of a model, a token for each replay of a CUDA graph |
| `dequantize` | make ordinary layers of a model's packed ones |
| `quantize_linear`, `quantize_module`, `PackedLinear` | quantize one linear layer, or those of a module of one's own |
| `HessianAccumulator`, `invert_hessian`, `group_salience` | salience of a weight's groups |
| `allocate_bits` | widths of the groups, by salience (SBA) |
| `calibrate_group` | scale and zero point of a group (SQC) |
| `QuantizedWeight`, `pack`, `unpack` | the packed format of a weight |
| `InputError` | raised for input the caller can put right, in a sentence that says how |
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimplus.utils.import_hook import after_import

if TYPE_CHECKING:
    from slimplus.api import QuantizationResult, quantize
    from slimplus.evaluation.decoding import GraphDecoder
    from slimplus.format.affine import QuantizedWeight
    from slimplus.format.planes import pack, unpack
    from slimplus.hub.checkpoint import dequantize, load
    from slimplus.nn.packed_linear import PackedLinear
    from slimplus.nn.quantize import quantize_linear, quantize_module
    from slimplus.quantization.salience import HessianAccumulator, group_salience, invert_hessian
    from slimplus.quantization.salience_allocation import allocate_bits
    from slimplus.quantization.salience_calibration import calibrate_group
    from slimplus.utils.errors import InputError

__version__ = "0.2.0"

__all__ = [
    "GraphDecoder",
    "HessianAccumulator",
    "InputError",
    "PackedLinear",
    "QuantizationResult",
    "QuantizedWeight",
    "__version__",
    "allocate_bits",
    "calibrate_group",
    "dequantize",
    "group_salience",
    "invert_hessian",
    "load",
    "pack",
    "quantize",
    "quantize_linear",
    "quantize_module",
    "unpack",
]

_MODULES = {
    "slimplus.api": ("QuantizationResult", "quantize"),
    "slimplus.evaluation.decoding": ("GraphDecoder",),
    "slimplus.format.affine": ("QuantizedWeight",),
    "slimplus.format.planes": ("pack", "unpack"),
    "slimplus.hub.checkpoint": ("dequantize", "load"),
    "slimplus.nn.packed_linear": ("PackedLinear",),
    "slimplus.nn.quantize": ("quantize_linear", "quantize_module"),
    "slimplus.quantization.salience": ("HessianAccumulator", "group_salience", "invert_hessian"),
    "slimplus.quantization.salience_allocation": ("allocate_bits",),
    "slimplus.quantization.salience_calibration": ("calibrate_group",),
    "slimplus.utils.errors": ("InputError",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))  # `slimplus.kernels` and `slimplus.recipes` lie beside the package in a checkout


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # to a type checker it would say that every name is there

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'slimplus' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOMES[name]), name)


def _register_quantizer() -> None:
    importlib.import_module("slimplus.hub.transformers_quantizer")


def _register_lora() -> None:
    importlib.import_module("slimplus.hub.peft_lora")


after_import("transformers.quantizers", _register_quantizer)
after_import("peft.tuners.lora.model", _register_lora)
