"""The order in which a chain reveals its masked positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.objectives import noise
from pipeline.objectives.objective import Scores, positions_like


@dataclass(frozen=True)
class Policy:
    """Ranks positions by what can be known without the truth: the input, its scores, its noise.

    Ranking never looks at the true token, not even by its probability: that is what keeps p(x0 | xt) along
    the chains equal to that of the data.

    Attributes:
        by_scores: [B, L] scores, of which the highest are revealed first; none = the order is known before.
        needs: the scores that are read besides the confidence.
    """

    by_scores: Callable[[Scores], Tensor] | None = None
    needs: tuple[str, ...] = ()
    left_to_right: bool = False

    def initial(self, seed: int, examples: Examples) -> Tensor:
        """Return the order [B, L] of what is revealed before the model has seen a chain, highest first."""
        positions = positions_like(examples.tokens)
        if self.left_to_right:
            return -positions.double().expand(examples.tokens.shape)
        return noise.uniform(seed, noise.REVEAL_ORDER, examples.ids[:, None], positions)

    def ranking(self, seed: int, examples: Examples, scores: Scores) -> Tensor:
        """Return scores [B, L] of which the highest are revealed first."""
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
