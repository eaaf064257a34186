"""PUMA leaves the optimum unchanged: along its chains p(x0 | xt) is that of the data.

On a distribution small enough to be solved exactly the ideal model scores every input; chains then walk by
its scores over many sequences drawn from the data. For each input that they come by, the sequences behind it
must be distributed as the data are, given what it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from pipeline.data.examples import ANSWER, Examples
from pipeline.objectives.layouts import Blocks, Whole
from pipeline.objectives.mixture import Mixture
from pipeline.objectives.policies import POLICIES
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.random_masking import RandomMasking
from pipeline.objectives.seam import Objective, Scores
from pipeline.objectives.stages import StageSchedule

TOKENS, LENGTH, COUNT, STAGES = 3, 4, 20_000, 4
MASK = TOKENS  # the symbols of an input: 0, 1, 2 and the mask
SEQUENCES = np.array(list(product(range(TOKENS), repeat=LENGTH)))  # [81, 4]
INPUTS = np.array(list(product(range(TOKENS + 1), repeat=LENGTH)))  # [256, 4]
LAYOUT = Whole(MASK, False)


def data_distribution() -> np.ndarray:
    """Return p(x0) [81], far from independent and far from uniform."""
    return np.random.default_rng(3).dirichlet(np.full(len(SEQUENCES), 0.25))


def posterior(p: np.ndarray) -> np.ndarray:
    """Return p(x0 | xt) [256, 81] of the data: those sequences that agree with what xt shows."""
    agrees = ((INPUTS[:, None] == SEQUENCES[None]) | (INPUTS[:, None] == MASK)).all(axis=2)
    joint = agrees * p
    return joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-300)


def code(symbols: torch.Tensor) -> torch.Tensor:
    """Return the index of each input [B, L] in INPUTS."""
    return (symbols * (TOKENS + 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(dim=1)


class ExactModel:
    """The scores of the ideal model, which knows the data's own conditionals."""

    def __init__(self, p: np.ndarray) -> None:
        one_hot = np.eye(TOKENS)[SEQUENCES]  # [81, 4, 3]
        conditionals = np.einsum("is,slv->ilv", posterior(p), one_hot)  # [256, 4, 3], p(x0_l = v | xt)
        self.conditionals = torch.from_numpy(conditionals)

    def scores(self, inputs: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """Return confidence, margin and entropy [3, B, L]; none of them looks at x0."""
        p = self.conditionals[code(inputs)]  # [B, 4, 3]
        top = p.topk(2, dim=-1).values
        entropy = torch.special.entr(p).sum(dim=-1)
        return torch.stack([top[..., 0], top[..., 0] - top[..., 1], entropy]).float()

    def forbidden(self, inputs: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """Return the probability of the true token in the place of every score."""
        p = self.conditionals[code(inputs)]
        return p.gather(2, x0[..., None]).squeeze(2).float().expand(3, -1, -1)


def walk(objective: Objective, scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> np.ndarray:
    """Return how often each sequence stood behind each input, [256, 81], over whole chains.

    A chain that shows an input at several stages counts once, so that the counts of an input are independent.
    An input of block k shows the clean blocks before it, and nothing behind it.
    """
    random = np.random.default_rng(0)
    drawn = random.choice(len(SEQUENCES), COUNT, p=data_distribution())
    x0 = torch.from_numpy(SEQUENCES[drawn])
    examples = Examples(x0, torch.full(x0.shape, ANSWER, dtype=torch.int8), torch.arange(COUNT))
    chains = objective.layout.chains(examples)
    state = objective.begin(chains, torch.zeros(COUNT, 1, dtype=torch.int64), 1)
    ended = torch.zeros(COUNT, dtype=torch.bool)
    seen = torch.zeros(COUNT, len(INPUTS), dtype=torch.bool)
    for step in range(1, 3 * STAGES):
        everything = torch.zeros(3, *x0.shape)
        for number in range(chains.count):
            inputs = x0.masked_fill(state.masked & (chains.index == number), MASK)
            inputs = inputs.masked_fill(chains.index > number, MASK)
            everything = torch.where(chains.index == number, scores(inputs, x0), everything)
            live = ~ended & (state.masked & (chains.index == number)).any(dim=1)
            seen[torch.arange(COUNT)[live], code(inputs)[live]] = True
        state, over, _ = objective.advance(chains, state, Scores(*everything), step, step + 1)
        ended |= over
    assert ended.all(), "every chain has ended"
    which = torch.from_numpy(drawn)
    return np.stack([seen[which == s].sum(dim=0).numpy() for s in range(len(SEQUENCES))], axis=1)


def excess(counts: np.ndarray) -> float:
    """Return the chi-square of the counts against p(x0 | xt), less its mean, in standard deviations.

    Each input is a multinomial of its own; sequences expected less than 5 times are taken together. The
    standard deviation is that of independent inputs; those of one chain are not quite, so it is larger.
    """
    statistic, freedom = 0.0, 0
    for observed, p in zip(counts, posterior(data_distribution()), strict=True):
        total = observed.sum()
        expected = total * p
        large = expected >= 5
        pairs = [(observed[large], expected[large])]
        rest = observed[~large].sum(), expected[~large].sum()
        if rest[1] >= 5:
            pairs.append((np.array([rest[0]]), np.array([rest[1]])))
        cells = sum(len(o) for o, _ in pairs)
        if cells < 2:
            continue
        statistic += sum(((o - e) ** 2 / e).sum() for o, e in pairs)
        freedom += cells - 1
    assert freedom > 50, "the chains come by many inputs"
    return (statistic - freedom) / np.sqrt(2 * freedom)


def chains(
    policy: str, threshold: float | None = None, stages: StageSchedule | None = None
) -> ProgressiveUnmasking:
    """Return PUMA over the tiny distribution."""
    return ProgressiveUnmasking(1, LAYOUT, stages or StageSchedule(STAGES), POLICIES[policy], threshold)


@pytest.mark.parametrize("threshold", [None, 0.8])
@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy"])
def test_the_posterior_along_the_chains_is_that_of_the_data(policy: str, threshold: float | None) -> None:
    model = ExactModel(data_distribution())
    assert excess(walk(chains(policy, threshold), model.scores)) < 5


@pytest.mark.parametrize("name", ["growing K", "random order", "left to right", "mixture", "blocks"])
def test_it_holds_for_every_other_way_of_walking(name: str) -> None:
    model = ExactModel(data_distribution())
    objective: Objective = {
        "growing K": chains("confidence", stages=StageSchedule(2, 1, 1, 1, STAGES)),
        "random order": chains("random"),
        "left to right": chains("left_to_right"),
        "mixture": Mixture(chains("confidence"), RandomMasking(1, LAYOUT), 0.3),
        "blocks": ProgressiveUnmasking(
            1, Blocks(MASK, False, size=2), StageSchedule(STAGES), POLICIES["margin"]
        ),
    }[name]
    assert excess(walk(objective, model.scores)) < 5


@pytest.mark.parametrize("threshold", [None, 0.8])
def test_ranking_by_the_probability_of_the_true_token_changes_it(threshold: float | None) -> None:
    """What is revealed then tells of the truth: the same test sees the difference by far."""
    model = ExactModel(data_distribution())
    assert excess(walk(chains("confidence", threshold), model.forbidden)) > 100


def test_the_minimiser_of_the_chains_loss_is_the_data() -> None:
    """The tokens seen at the masked positions of each input average to the data's conditionals there."""
    p = data_distribution()
    model = ExactModel(p)
    counts = walk(chains("confidence"), model.scores)
    totals = counts.sum(axis=1)
    often = totals > 1000
    assert often.sum() > 10
    one_hot = np.eye(TOKENS)[SEQUENCES]
    fitted = np.einsum("is,slv->ilv", counts[often] / totals[often, None], one_hot)
    np.testing.assert_allclose(fitted, model.conditionals[torch.from_numpy(often)], atol=0.05)
