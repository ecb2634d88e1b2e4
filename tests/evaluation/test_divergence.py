"""The divergence from the full-precision model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimplus.evaluation.divergence import TOP, Comparison, Recorder, cut, divergence, statistics
from slimplus.evaluation.perplexity import perplexity
from slimplus.models.loading import ModelSource
from slimplus.models.streaming import StreamedModel
from tests.support.blocks import RUNNER
from tests.support.models import ModelMaker


def random_logits(predictions: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(predictions, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def compare(full: torch.Tensor, other: torch.Tensor, at_a_time: int = 7) -> Comparison:
    recorder = Recorder()
    for part in full.split(at_a_time):
        recorder.add(part)
    comparison = Comparison(recorder.predictions())
    for part in other.split(at_a_time):
        comparison.add(part)
    return comparison


def figures(comparison: Comparison) -> dict[str, float]:
    return statistics(torch.cat(comparison.divergences), torch.cat(comparison.agreements))


@pytest.mark.parametrize("vocabulary", [5, TOP, TOP + 1, 1000])
def test_an_equal_model_diverges_by_exactly_nothing(vocabulary: int) -> None:
    logits = random_logits(40, vocabulary).bfloat16().float()  # with many ties
    found = figures(compare(logits, logits.clone()))
    assert found == {"kl_mean": 0, "kl_median": 0, "kl_p99": 0, "kl_max": 0, "top_token_agreement": 1}


@pytest.mark.parametrize("vocabulary", [7, TOP])
def test_a_small_vocabulary_gives_the_whole_divergence(vocabulary: int) -> None:
    full = random_logits(33, vocabulary)
    other = full + 0.3 * random_logits(33, vocabulary, seed=1)
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    found = torch.cat(compare(full, other).divergences)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    measured = figures(compare(full, other))
    assert measured["top_token_agreement"] == agreement < 1
    ordered = expected.sort().values
    assert measured["kl_mean"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert measured["kl_median"] == pytest.approx(float(ordered[16]), rel=1e-4)
    assert measured["kl_p99"] == pytest.approx(float(ordered[31] + 0.68 * (ordered[32] - ordered[31])), rel=1e-4)
    assert measured["kl_max"] == pytest.approx(float(ordered[-1]), rel=1e-4)


def test_a_large_vocabulary_gives_that_of_the_top_tokens_and_the_rest() -> None:
    full = random_logits(20, 500)
    other = full + 0.5 * random_logits(20, 500, seed=1)
    p, q = full.double().softmax(-1), other.double().softmax(-1)
    found = torch.cat(compare(full, other).divergences)
    for row in range(20):
        top = set(p[row].topk(TOP).indices.tolist())
        rest = [token for token in range(500) if token not in top]
        pairs = [(float(p[row, token]), float(q[row, token])) for token in top]
        pairs.append((float(p[row, rest].sum()), float(q[row, rest].sum())))
        expected = math.fsum(a * math.log(a / b) for a, b in pairs)
        assert float(found[row]) == pytest.approx(expected, rel=1e-4)
        assert found[row] < float((p[row] * (p[row] / q[row]).log()).sum())


@given(st.integers(0, 10_000), st.floats(0.0, 3.0), st.integers(2, 200))
def test_it_is_at_least_nothing_and_at_most_that_of_the_vocabulary(seed: int, change: float, vocabulary: int) -> None:
    full = random_logits(3, vocabulary, seed)
    other = full + change * random_logits(3, vocabulary, seed + 1)
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    found = torch.cat(compare(full, other).divergences)
    assert bool((found >= 0).all())
    assert bool((found <= (p.exp() * (p - q)).sum(-1) + 1e-5).all())


def test_tokens_that_are_impossible_add_nothing() -> None:
    full = torch.tensor([[0.0, 0.0, -torch.inf]])
    other = torch.tensor([[0.0, 0.0, 0.0]])
    tokens = torch.tensor([[0, 1, 2]])
    found = divergence(cut(full, tokens), cut(other, tokens))
    assert float(found) == pytest.approx(math.log(1.5), rel=1e-6)


def test_an_unquantized_copy_run_block_by_block_diverges_by_nothing(
    make_model: ModelMaker, tokens: torch.Tensor
) -> None:
    source = ModelSource(str(make_model("llama")), dtype="float32")
    recorder = Recorder()
    full = perplexity(StreamedModel(source.model(), RUNNER), tokens, "full", recorder.add)
    comparison = Comparison(recorder.predictions())
    assert perplexity(StreamedModel(source.model(), RUNNER), tokens, "copy", comparison.add) == full
    assert sum(map(len, comparison.divergences)) == 3 * 23
    assert figures(comparison)["kl_max"] == 0
    assert figures(comparison)["top_token_agreement"] == 1
