"""The perplexity of a streamed model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.text import Perplexity

from slimplus.evaluation.perplexity import perplexity
from slimplus.evaluation.texts import counted_tokens
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import BlockRunner, StreamedModel
from slimplus.utils.errors import InputError
from tests.support.blocks import CPU, RUNNER
from tests.support.models import ModelMaker


def test_the_perplexity_of_a_broken_model_is_a_number(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    """A token may be so unlikely that float32 gives it no probability at all."""
    model = ModelSource(str(make_model("llama")), dtype="float32").model()
    with torch.no_grad():
        model.model.norm.weight *= 40 / model(input_ids=tokens).logits.std()
        logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.isinf(Perplexity()(logits[:, :-1], tokens[:, 1:]))
    measured = perplexity(StreamedModel(model, RUNNER), tokens, "test")
    assert math.log(measured) == pytest.approx(float(expected), rel=1e-4)


def test_perplexity_is_that_of_the_whole_model(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    source = ModelSource(str(make_model("llama")), dtype="float32")
    with torch.no_grad():
        logits = source.model()(input_ids=tokens).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp()
    measured = perplexity(StreamedModel(source.model(), RUNNER), tokens, "test")
    assert measured == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "remedy"), [("32-true", "download the model again"), ("bf16-mixed", "try trainer.precision=32-true")]
)
def test_a_perplexity_that_is_no_number_is_no_result(
    make_model: ModelMaker, tokens: torch.Tensor, precision: str, remedy: str
) -> None:
    model = ModelSource(str(make_model("llama")), dtype="float32").model()
    model.lm_head.weight.data *= float("inf")
    streamed = StreamedModel(model, BlockRunner(CPU, precision))
    with pytest.raises(InputError, match=rf"perplexity, test: it is nan, so .*overflowed; .*{remedy}"):
        perplexity(streamed, tokens, "test")


def test_overlapping_windows_give_the_perplexity_of_a_sliding_window(make_model: ModelMaker) -> None:
    """As in transformers' page on the perplexity of models of fixed length: each token once, in the longest context."""
    text = torch.randint(1, 250, (1, 60), generator=torch.Generator().manual_seed(1))
    source = ModelSource(str(make_model("llama")), dtype="float32")
    losses = []
    with torch.no_grad():
        for start, first in [(0, 1), (8, 24), (16, 32), (24, 40)]:
            labels = text[:, start : start + 24].clone()
            labels[:, : first - start] = -100
            logits = source.model()(input_ids=text[:, start : start + 24]).logits
            losses.append(nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="sum"))
    windows = text[0, :48].unfold(0, 24, 8)
    model = StreamedModel(source.model(), RUNNER)
    measured = perplexity(model, windows, "test", counted=counted_tokens(4, 24, 8))
    assert math.log(measured) == pytest.approx(float(sum(losses)) / 47, rel=1e-5)
