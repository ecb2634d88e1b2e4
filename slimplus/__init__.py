"""slimplus: training-based, salience-driven mixed-precision quantization of language models.

`import slimplus` makes transformers load packed checkpoints: `AutoModelForCausalLM.from_pretrained(path)`. It imports
nothing heavy by itself: the quantization method registers once transformers' quantizers are imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wrapt

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))  # `slimplus.kernels` and `slimplus.recipes` lie beside the package in a checkout


def _register(_: object) -> None:
    from slimplus.hub.transformers_quantizer import register

    register()


wrapt.register_post_import_hook(_register, "transformers.quantizers")


def __getattr__(name: str) -> Any:
    if name == "load":
        from slimplus.hub.checkpoint import load

        return load
    raise AttributeError(f"module 'slimplus' has no attribute '{name}'")


__all__ = ["load"]
