"""LoRA adapters of PEFT on packed layers: trained, saved and loaded as on ordinary ones, and kept beside them.

PEFT asks dispatchers in turn for the adapter of a layer. `register` puts one for packed layers before the last of them,
which knows ordinary layers; PEFT's own way to add one (`LoraConfig._register_custom_module`) holds for one
configuration object, and is not there when an adapter is loaded.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from torch import nn

from slimplus.nn import PackedLinear

REMEDY = "slimplus.dequantize(model) makes ordinary layers"
INITIALIZATIONS = ("gaussian", "eva")  # by name; the others change the weight that the adapter is added to


class PackedLora(Linear):
    """Adapter of a packed layer: `LoRA(x)` is added to the packed layer's output."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT takes the sizes from it all the same
            super().__init__(*arguments, **others)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **others: Any) -> None:
        """Create an adapter.

        Raises:
            ValueError: for a variant or an initialization that needs or changes the weight.
        """
        if isinstance(name := config.init_lora_weights, str) and name not in INITIALIZATIONS:
            raise ValueError(f"init_lora_weights={name!r} changes the weight, which packed layers cannot; {REMEDY}")
        if self.resolve_lora_variant(config=config) is not None:
            raise ValueError(f"packed layers take plain LoRA, no variant of it such as DoRA; {REMEDY}")
        super().update_layer(adapter_name, r, lora_alpha, config, **others)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the adapter into the weight, once `slimplus.dequantize` has made an ordinary layer of the packed one.

        Raises:
            ValueError: if the layer is packed.
        """
        if isinstance(self.get_base_layer(), PackedLinear):
            raise ValueError(f"packed layers cannot take an adapter in; {REMEDY}, or keep the adapter beside them")
        super().merge(safe_merge, adapter_names)


def register() -> None:
    """Let PEFT know packed layers; a second call does nothing."""
    ordinary = lora_model.dispatch_default
    if getattr(ordinary, "knows_packed_layers", False):
        return

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **others: Any) -> nn.Module | None:
        given: Any = target
        base = given.get_base_layer() if hasattr(given, "get_base_layer") else given
        if isinstance(base, PackedLinear) and others.get("parameter_name") is None:
            return PackedLora(target, adapter_name, config=config, **others)
        adapter: nn.Module | None = ordinary(target, adapter_name, config=config, **others)
        return adapter

    dispatch.knows_packed_layers = True  # type: ignore[attr-defined]
    lora_model.dispatch_default = dispatch  # type: ignore[assignment]


register()
