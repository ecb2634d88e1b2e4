"""The rows of `benchmarks/quality/run.py`: every method, and what all of them have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any

FULL, PEER, OURS = "full precision", "AutoRound", "ours"


@dataclass(frozen=True)
class Method:
    """How a row is made.

    Attributes:
        keys: of the recipe, `key=value`.
        after: the method whose finished blocks are trained end to end.
    """

    keys: tuple[str, ...] = ()
    after: str | None = None


def _method(method: str, allocation: str, *keys: str) -> Method:
    return Method((f"quantization.method={method}", f"quantization.allocation={allocation}", *keys))


# What of `--keys` the peer heeds, or its measuring does.
PEER_KEYS = ("model.", "data.", "trainer.", "quantization.group_size=", "training.batch_size=")
WEIGHTS = "training.parametrization=weights"
METHODS = {
    FULL: Method(),
    "RTN": _method("rtn", "uniform"),
    "GPTQ": _method("gptq", "uniform"),
    "SliM-LLM": _method("slimllm", "slimllm"),
    "learnable clipping": _method("slimllm_plus", "uniform"),
    "SliM-LLM+": _method("slimllm_plus", "slimllm"),
    PEER: _method("qat", "uniform"),  # the keys give it bits and steps
    "uniform, weights": _method("qat", "uniform", WEIGHTS),
    "uniform, rounding": _method("qat", "uniform"),
    "SliM-LLM's bits, weights": _method("qat", "slimllm", WEIGHTS),
    "SliM-LLM's bits, rounding": _method("qat", "slimllm"),
    "ours, weights": _method("qat", "model", WEIGHTS),
    OURS: _method("qat", "model"),
    "uniform, weights, end to end": Method(after="uniform, weights"),
    "uniform, rounding, end to end": Method(after="uniform, rounding"),
    "ours, end to end": Method(after=OURS),
    # One choice of ours each, done otherwise.
    "ours, bits block by block": _method("qat", "block"),
    "ours, plain squared error": _method("qat", "model", "training.loss.error=mse"),
    "ours, error after the norm": _method("qat", "model", "training.loss.error=after_norm"),
    "ours, AdamW": _method("qat", "model", "training.optimizer=adamw"),
    "ours, only the grid": _method("slimllm_plus", "model"),
    "ours, end to end, scales only": Method(("end_to_end.zero_points=false",), OURS),
    "ours, end to end, norms frozen": Method(("end_to_end.norm_learning_rate=0",), OURS),
    "ours, end to end, next token": Method(("end_to_end.distillation=0", "end_to_end.next_token=1"), OURS),
}


@dataclass(frozen=True)
class Budget:
    """What all methods have in common.

    Attributes:
        bits: on average.
        samples: calibration windows.
        sequence_length: tokens in one.
        epochs: passes over the windows for each block; a step takes one window.
        end_to_end_epochs: passes over them for the whole model.
        seed: of the windows and of training.
        overrides: `key=value` for every method.
    """

    bits: int
    samples: int
    sequence_length: int
    epochs: int
    end_to_end_epochs: int
    seed: int
    overrides: tuple[str, ...] = ()

    def row(self, method: str, calibration: str) -> dict[str, Any]:
        """The part of a row that says what it is the result of; `calibration` is the text's name."""
        if method == FULL:
            return {"method": method, "overrides": list(self.overrides)}
        values = {"method": method, "calibration": calibration} | asdict(self) | {"overrides": list(self.overrides)}
        if METHODS[method].after is None:
            del values["end_to_end_epochs"]
        return values

    def keys(self, method: str) -> list[str]:
        """The recipe's keys for a method."""
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
        """A name for the folder of a method's run, short enough for any file system, however many keys there are."""
        values = [method, self.bits, self.samples, self.sequence_length, self.epochs]
        values += [self.end_to_end_epochs] if METHODS[method].after else []
        name = "-".join(map(str, [*values, self.seed, *self.overrides]))
        readable = "".join(letter if letter.isalnum() or letter in "-=." else "_" for letter in name)
        return readable if len(readable) <= 200 else f"{readable[:160]}-{sha256(name.encode()).hexdigest()[:16]}"


def identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row is the result of; rows of the same are one, measured again."""
    keys = ("method", "calibration", *(field.name for field in fields(Budget)))
    return tuple(str(row.get(key)) for key in keys)
