"""What every part of a recipe rests on: errors, numbers, and the base of all sections."""

from __future__ import annotations

import contextlib
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from slimplus.utils.errors import InputError


class RecipeError(InputError):
    """Error in a recipe: one sentence a line, each naming the key or the file, and a remedy."""


def _number(value: object) -> object:
    """Return the number that a text stands for: YAML 1.1 reads `1e-3`, which has no dot, as text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


Number = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, without unknown keys and silent conversions.

    Attributes:
        shorthand: the key of the section that a plain value, given in its place, sets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        """Return a section for a plain value in its place."""
        return value if cls.shorthand is None or isinstance(value, (dict, Section)) else {cls.shorthand: value}
