"""The choices of experts of two models, compared."""

from __future__ import annotations

import torch

from slimplus.evaluation.routing import matches


def test_choices_agree_in_any_order() -> None:
    expected = {"0.mlp.experts": torch.tensor([[0, 1], [2, 3]]), "1.mlp.experts": torch.tensor([[4, 5], [6, 7]])}
    found = {"0.mlp.experts": torch.tensor([[1, 0], [2, 4]]), "1.mlp.experts": torch.tensor([[5, 6], [0, 1]])}
    assert matches(found, expected) == (4, 8)
