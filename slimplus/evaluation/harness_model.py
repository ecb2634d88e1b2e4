"""A model as the Language Model Evaluation Harness asks it, which tells how many requests it has answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

Told = Callable[[int, int], None]
"""`(requests answered, requests known so far) -> None`; the harness asks one kind of request after the other."""


class _Answered(CacheHook):
    """Hook that the harness hands each answer to, to be cached; here answers are counted."""

    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__(None)
        self._count = count

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._count()


class CountedModel(HFLM):
    """Causal language model of transformers that tells of each request it has answered.

    Args:
        told: function that is told.
        arguments: arguments of `HFLM`.
    """

    def __init__(self, told: Told, **arguments: Any) -> None:
        super().__init__(backend="causal", **arguments)
        self._told, self._answered, self._asked = told, 0, 0
        self.set_cache_hook(_Answered(self._count))

    def _count(self) -> None:
        self._answered += 1
        self._told(self._answered, self._asked)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Return the log-probability of each request's continuation, and whether it is the greedy one."""
        self._asked += len(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Return the log-probability of each request's whole text."""
        self._asked += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Return the text that the model writes for each request."""
        self._asked += len(requests)
        return super().generate_until(requests, disable_tqdm)
