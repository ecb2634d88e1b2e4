"""The methods that `benchmarks/quality/run.py` compares, and the budget that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any

FULL, AUTOROUND, SLIMPLUS = "full precision", "AutoRound", "slimplus"


@dataclass(frozen=True)
class Method:
    """Keys of the recipe that make a method.

    Attributes:
        keys: keys of the recipe, as `key=value`.
        after: the method whose finished blocks this one trains end to end.
    """

    keys: tuple[str, ...] = ()
    after: str | None = None


def _method(method: str, allocation: str, *keys: str) -> Method:
    """Return a method of `quantization.method` with an allocation and further keys."""
    return Method((f"quantization.method={method}", f"quantization.allocation={allocation}", *keys))


# Keys that matter to AutoRound or to the measurement of its result; others in `--keys` are refused.
AUTOROUND_KEYS = ("model.", "data.", "trainer.", "quantization.group_size=", "training.batch_size=")
WEIGHTS = "training.parametrization=weights"
METHODS = {
    FULL: Method(),
    "RTN": _method("rtn", "uniform"),
    "GPTQ": _method("gptq", "uniform"),
    "SliM-LLM": _method("slimllm", "slimllm"),
    "learnable clipping": _method("slimllm_plus", "uniform"),
    "SliM-LLM+": _method("slimllm_plus", "slimllm"),
    AUTOROUND: _method("qat", "uniform"),  # autoround.py reads bits and steps from these keys
    "uniform, weights": _method("qat", "uniform", WEIGHTS),
    "uniform, rounding": _method("qat", "uniform"),
    "SliM-LLM's bits, weights": _method("qat", "slimllm", WEIGHTS),
    "SliM-LLM's bits, rounding": _method("qat", "slimllm"),
    "slimplus, weights": _method("qat", "model", WEIGHTS),
    SLIMPLUS: _method("qat", "model"),
    "uniform, weights, end to end": Method(after="uniform, weights"),
    "uniform, rounding, end to end": Method(after="uniform, rounding"),
    "slimplus, end to end": Method(after=SLIMPLUS),
    # Each with one choice changed.
    "slimplus, bits block by block": _method("qat", "block"),
    "slimplus, plain squared error": _method("qat", "model", "training.loss.error=mse"),
    "slimplus, error after the norm": _method("qat", "model", "training.loss.error=after_norm"),
    "slimplus, AdamW": _method("qat", "model", "training.optimizer=adamw"),
    "slimplus, errors of inputs made up for": _method("qat", "model", "quantization.error_propagation=1"),
    "slimplus, only the grid": _method("slimllm_plus", "model"),
    "slimplus, end to end, scales only": Method(("end_to_end.zero_points=false",), SLIMPLUS),
    "slimplus, end to end, norms frozen": Method(("end_to_end.norm_learning_rate=0",), SLIMPLUS),
    "slimplus, end to end, next token": Method(("end_to_end.distillation=0", "end_to_end.next_token=1"), SLIMPLUS),
}


@dataclass(frozen=True)
class Budget:
    """Bits, windows and training steps, which are the same for all methods.

    Attributes:
        bits: average bits of a weight.
        samples: number of calibration windows.
        sequence_length: number of tokens in a window.
        epochs: passes over the windows for each block; a step takes one window.
        end_to_end_epochs: passes over the windows for the whole model.
        seed: seed of the windows and of training.
        overrides: keys of the recipe for every method, as `key=value`.
    """

    bits: int
    samples: int
    sequence_length: int
    epochs: int
    end_to_end_epochs: int
    seed: int
    overrides: tuple[str, ...] = ()

    def row(self, method: str, calibration: str) -> dict[str, Any]:
        """Return the fields of a row that identify it; `calibration` is the name of the calibration text."""
        if method == FULL:
            return {"method": method, "overrides": list(self.overrides)}
        values = {"method": method, "calibration": calibration} | asdict(self) | {"overrides": list(self.overrides)}
        if METHODS[method].after is None:
            del values["end_to_end_epochs"]
        return values

    def keys(self, method: str) -> list[str]:
        """Return the keys of the recipe for a method."""
        after = METHODS[method].after
        return [
            f"quantization.bits={self.bits}",
            f"data.samples={self.samples}",
            f"data.sequence_length={self.sequence_length}",
            f"training.epochs={self.epochs}",
            f"end_to_end.epochs={self.end_to_end_epochs if after else 0}",
            f"seed={self.seed}",
            *(METHODS[after].keys if after else ()),
            *METHODS[method].keys,
            *self.overrides,
        ]

    def folder_name(self, method: str) -> str:
        """Return a name for the folder of a method's run, short enough for file systems however many keys there are."""
        values = [method, self.bits, self.samples, self.sequence_length, self.epochs]
        values += [self.end_to_end_epochs] if METHODS[method].after else []
        name = "-".join(map(str, [*values, self.seed, *self.overrides]))
        readable = "".join(letter if letter.isalnum() or letter in "-=." else "_" for letter in name)
        return readable if len(readable) <= 200 else f"{readable[:160]}-{sha256(name.encode()).hexdigest()[:16]}"


def identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what identifies a row; a row of the same identity is the same one, measured again."""
    keys = ("method", "calibration", *(field.name for field in fields(Budget)))
    return tuple(str(row.get(key)) for key in keys)
