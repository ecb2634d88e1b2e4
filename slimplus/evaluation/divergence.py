"""How far a quantized model's predictions are from those of the model that it was made from.

Of each prediction of the full-precision model only the likeliest tokens are kept, and the mass of all others. So the
model runs once, and a prediction takes half a kilobyte whatever the vocabulary. The KL divergence is computed between
the distributions over these tokens and "any other": it is 0 for equal predictions, never more than the divergence over
the whole vocabulary, and equal to it where no other token is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TOP = 64  # tokens kept of a prediction
SMALLEST_LOGIT = -80.0  # below the largest one


@dataclass(frozen=True, eq=False)
class TopPredictions:
    """Predictions of next tokens, each cut to its likeliest tokens and the mass of the rest.

    Attributes:
        tokens: the likeliest tokens, the likeliest first, `[predictions, top]`, int32.
        log_probabilities: their logarithmic probabilities, and last that of any other token,
            `[predictions, top + 1]`, float32.
    """

    tokens: Tensor
    log_probabilities: Tensor


class Recorder:
    """Recorder of a model's predictions; `add` sees its logits."""

    def __init__(self) -> None:
        self._tokens: list[Tensor] = []
        self._log_probabilities: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """Keep what counts of logits `[predictions, vocabulary]`, on the CPU."""
        tokens = logits.topk(min(TOP, logits.shape[-1])).indices
        self._tokens.append(tokens.int().cpu())
        self._log_probabilities.append(cut(logits, tokens).cpu())

    def predictions(self) -> TopPredictions:
        """Return all predictions so far."""
        return TopPredictions(torch.cat(self._tokens), torch.cat(self._log_probabilities))


@dataclass(eq=False)
class Comparison:
    """Comparison of a model's predictions with those of a reference; `add` sees its logits.

    Attributes:
        reference: the predictions of the reference for the same tokens.
        divergences: KL divergence of each prediction so far, float64, in parts.
        agreements: whether each prediction so far has the reference's top token, in parts.
    """

    reference: TopPredictions
    divergences: list[Tensor] = field(default_factory=list)
    agreements: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor) -> None:
        """Compare logits `[predictions, vocabulary]` with the next predictions of the reference."""
        start = sum(map(len, self.divergences))
        span = slice(start, start + len(logits))
        tokens = self.reference.tokens[span].to(logits.device, torch.int64)
        expected = self.reference.log_probabilities[span].to(logits.device)
        self.divergences.append(divergence(expected, cut(logits, tokens)).cpu())
        top = logits.gather(-1, tokens[:, :1]).squeeze(-1)
        self.agreements.append((top == logits.amax(-1)).cpu())  # of equally likely tokens, any is the top one


def cut(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the logarithmic probabilities of `tokens`, and that of any other token.

    Args:
        logits: `[predictions, vocabulary]`.
        tokens: `[predictions, top]`, int64.

    Returns:
        `[predictions, top + 1]`, float32; equal logits give equal bits. The vocabulary is summed in float64, of
        exponentials in float32: one pass over it, of which a vocabulary of 49,152 makes nearly all the work.
    """
    logits = logits.float()
    largest = logits.amax(-1, keepdim=True)
    # Below float32's range all other tokens together would get no mass, and the divergence could be infinite.
    masses = (logits - largest).clamp_(min=SMALLEST_LOGIT).exp_()
    chosen = masses.gather(-1, tokens).double()
    others = masses.scatter_(-1, tokens, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    total = chosen.sum(-1, keepdim=True) + others
    known = logits.gather(-1, tokens).double() - largest.double()
    return (torch.cat([known, others.log()], -1) - total.log()).float()


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return the KL divergence of each prediction from the expected one, in nats, `[predictions]`, float64.

    Args:
        expected: logarithmic probabilities `[predictions, outcomes]`.
        found: those of the other model for the same outcomes.
    """
    expected, found = expected.double(), found.double()
    terms = expected.exp() * (expected - found)
    # An outcome without probability adds nothing. Rounding may leave a sum a little below 0.
    return torch.where(expected > -torch.inf, terms, 0.0).sum(-1).clamp(min=0.0)


def statistics(divergences: Tensor, agreements: Tensor) -> dict[str, float]:
    """Return the figures of a text, under the names that metrics.json gives them.

    Args:
        divergences: KL divergence of each prediction, `[predictions]`, float64.
        agreements: whether each prediction has the reference's top token, `[predictions]`.
    """
    median, p99 = divergences.quantile(torch.tensor([0.5, 0.99], dtype=divergences.dtype)).tolist()
    return {
        "kl_mean": float(divergences.mean()),
        "kl_median": median,
        "kl_p99": p99,
        "kl_max": float(divergences.max()),
        "top_token_agreement": float(agreements.double().mean()),
    }
