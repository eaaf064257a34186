"""Policies: the order in which a chain reveals its masked positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.objectives import noise
from pipeline.objectives.seam import Scores, positions_like


@dataclass(frozen=True)
class Policy:
    """Rank positions by the input, the model's scores and noise, never by the true tokens.

    Not even the probability of the true token is used. This keeps p(x0 | xt) along the chains equal to that
    of the data.

    Attributes:
        by_scores: maps the scores to a ranking [B, L], highest first; None = the order needs no scores.
        needs: scores that `by_scores` reads besides the confidence.
        left_to_right: reveal from left to right; otherwise, without `by_scores`, in random order.
    """

    by_scores: Callable[[Scores], Tensor] | None = None
    needs: tuple[str, ...] = ()
    left_to_right: bool = False

    def initial(self, seed: int, examples: Examples) -> Tensor:
        """Return the ranking [B, L] before the model has scored a chain, highest first."""
        positions = positions_like(examples.tokens)
        if self.left_to_right:
            return -positions.double().expand(examples.tokens.shape)
        return noise.uniform(seed, noise.REVEAL_ORDER, examples.ids[:, None], positions)

    def ranking(self, seed: int, examples: Examples, scores: Scores) -> Tensor:
        """Return the ranking [B, L], highest first."""
        return self.initial(seed, examples) if self.by_scores is None else self.by_scores(scores)


def _margin(scores: Scores) -> Tensor:
    assert scores.margin is not None
    return scores.margin


def _certainty(scores: Scores) -> Tensor:
    assert scores.entropy is not None
    return -scores.entropy


POLICIES = {
    "confidence": Policy(lambda scores: scores.confidence),
    "margin": Policy(_margin, ("margin",)),
    "entropy": Policy(_certainty, ("entropy",)),
    "random": Policy(),
    "left_to_right": Policy(left_to_right=True),
}
