"""Random masking in all its forms against the NumPy oracle, its distribution and its expectation."""

from __future__ import annotations

from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Config, ObjectiveConfig, TrainConfig
from pipeline.data.examples import ANSWER, PROMPT, Examples
from pipeline.objectives import build, held_out_objective
from pipeline.objectives.layouts import Blocks, Whole
from pipeline.objectives.mask_ratio import UNIFORM, MaskRatio
from pipeline.objectives.random_masking import RandomMasking
from pipeline.objectives.seam import ChainState, Scores
from support import oracles

LAYOUT = Whole(mask_id=3, has_padding=False)
BELL = MaskRatio(mean=0.6, std=0.2)


def zeros(count: int) -> torch.Tensor:
    """Return the first stage [B, 1] of `count` sequences."""
    return torch.zeros(count, 1, dtype=torch.int64)


def answers_only(count: int, length: int) -> Examples:
    """Return `count` sequences of one prompt token and `length` answer tokens."""
    roles = torch.full((count, 1 + length), ANSWER, dtype=torch.int8)
    roles[:, 0] = PROMPT
    return Examples(torch.zeros(count, 1 + length, dtype=torch.int64), roles, torch.arange(count))


def positions(state: ChainState, row: int) -> set[int]:
    """Return the masked positions of a row."""
    return set(state.masked[row].nonzero().flatten().tolist())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(0, 10_000), st.none() | st.integers(1, 9), st.integers(0, 3))
def test_uniform_counts_equal_the_oracle(length: int, seed: int, strata: int | None, stage: int) -> None:
    """Stratified or not; each stage has a draw of its own."""
    examples = answers_only(5, length)
    state = RandomMasking(seed, LAYOUT, strata=strata).begin(LAYOUT.chains(examples), zeros(5) + stage, 1)
    for row in range(5):
        answer = list(range(1, length + 1))
        assert positions(state, row) == oracles.random_mask(seed, row, answer, stage, strata=strata)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(0, 10_000), st.none() | st.integers(1, 9))
def test_bernoulli_masks_and_weights_equal_the_oracle(length: int, seed: int, strata: int | None) -> None:
    """Never empty, whatever t; the weights are those of the loss divided by t L, times P(not empty)."""
    examples = answers_only(5, length)
    objective = RandomMasking(seed, LAYOUT, "bernoulli", strata)
    state = objective.begin(LAYOUT.chains(examples), zeros(5), 1)
    weights = objective.weights(LAYOUT.chains(examples), state)
    for row in range(5):
        masked, weight = oracles.bernoulli_mask(seed, row, list(range(1, length + 1)), strata)
        assert positions(state, row) == masked
        assert masked, "a sequence without a mask would waste its forward"
        np.testing.assert_allclose(weights[row, sorted(masked)] * 5, weight, rtol=1e-6)
        assert weight <= 1 + 1e-12


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 14), st.integers(1, 5), st.integers(0, 1000))
def test_blocks_are_masked_independently(length: int, size: int, seed: int) -> None:
    """Each block has a number of its own; the loss is the mean over its sequence's blocks."""
    examples, layout = answers_only(4, length), Blocks(3, False, size=size)
    objective = RandomMasking(seed, layout)
    state = objective.begin(layout.chains(examples), zeros(4), 1)
    weights = objective.weights(layout.chains(examples), state)
    starts = range(1, length + 1, size)
    for row in range(4):
        expected = set()
        for number, start in enumerate(starts):
            block = list(range(start, min(start + size, length + 1)))
            masked = oracles.random_mask(seed, row, block, number=number)
            assert masked
            np.testing.assert_allclose(weights[row, sorted(masked)], 1 / (len(masked) * len(starts) * 4))
            expected |= masked
        assert positions(state, row) == expected


@pytest.mark.parametrize("ratios", [BELL, MaskRatio(0.3, 0.8), MaskRatio(0.2, 1.0, 0.5, 0.1)])
def test_counts_follow_the_distribution_of_the_mask_ratio(ratios: MaskRatio) -> None:
    """Each n is as frequent as the distribution says, to 5 standard deviations; a mask weighs 1/n."""
    rows, length = 50_000, 10
    chains = LAYOUT.chains(answers_only(rows, length))
    objective = RandomMasking(1, LAYOUT, ratios=ratios)
    state = objective.begin(chains, zeros(rows), 1)
    found = np.bincount(state.masked.sum(dim=1).numpy(), minlength=length + 1)[1:]

    def below(ratio: float) -> float:
        ratio = min(max(ratio, ratios.low), ratios.high)
        if ratios.std is None:
            return (ratio - ratios.low) / (ratios.high - ratios.low)
        normal = NormalDist(ratios.mean, ratios.std)
        low, high = normal.cdf(ratios.low), normal.cdf(ratios.high)
        return (normal.cdf(ratio) - low) / (high - low)

    expected = np.array([below(n / length) - below((n - 1) / length) for n in range(1, length + 1)])
    assert (np.abs(found - rows * expected) <= 5 * np.sqrt(rows * expected * (1 - expected)) + 1e-6).all()
    weights = objective.weights(chains, state) * state.masked
    torch.testing.assert_close(weights.sum(dim=1), torch.full((rows,), 1 / rows))


def exact_bound(length: int, loss: dict[frozenset[int], float]) -> float:
    """Return the mean over n of the mean over masks of n positions of the mean loss of a position."""
    means = [
        np.mean([loss[frozenset(mask)] / n for mask in combinations(range(1, length + 1), n)])
        for n in range(1, length + 1)
    ]
    return float(np.mean(means))


@pytest.mark.parametrize(
    ("count", "strata", "complementary", "ratios"),
    [("uniform", None, False, UNIFORM), ("uniform", 50, False, UNIFORM), ("uniform", None, True, UNIFORM),
     ("uniform", 50, True, UNIFORM), ("bernoulli", None, False, UNIFORM), ("bernoulli", 50, False, UNIFORM),
     ("uniform", None, False, BELL), ("uniform", 50, False, BELL)],
)  # fmt: skip
@pytest.mark.parametrize("length", [1, 4])
def test_every_form_is_unbiased(
    count: str, strata: int | None, complementary: bool, ratios: MaskRatio, length: int
) -> None:
    """The expected loss is the bound / L_eff, for a loss that depends on the whole mask in any way.

    Also where an empty mask is the likeliest (L_eff = 1), and where a full one has no complement.
    """
    random = np.random.default_rng(length)
    masks = [frozenset(m) for n in range(1, length + 1) for m in combinations(range(1, length + 1), n)]
    table = {mask: float(random.exponential(len(mask))) for mask in masks}
    lookup = np.zeros(2**length)
    for mask, value in table.items():
        lookup[sum(1 << (i - 1) for i in mask)] = value / len(mask)  # of each masked position
    chains = LAYOUT.chains(answers_only(100_000, length))
    objective = RandomMasking(2, LAYOUT, count, strata, complementary, ratios, True)  # type: ignore[arg-type]
    state = objective.begin(chains, zeros(100_000), 1)
    losses, rounds = np.zeros(100_000), 0
    while True:
        assert state.masked.any(dim=1).all()
        codes = (state.masked[:, 1:].long() << torch.arange(length)).sum(dim=1).numpy()
        weights = (objective.weights(chains, state) * state.masked).sum(dim=1).double().numpy() * 100_000
        losses += weights * lookup[codes]
        rounds += 1
        state, ended, _ = objective.advance(chains, state, Scores(torch.zeros(1)), rounds, rounds + 1)
        if ended.all():
            break
        assert not ended.any()
    assert rounds == 1 + complementary
    error = losses.std() / np.sqrt(len(losses)) / rounds
    assert losses.mean() / rounds == pytest.approx(exact_bound(length, table), abs=4 * error + 1e-6)


def test_count_and_positions_are_uniform() -> None:
    examples = answers_only(20_000, 10)
    masked = RandomMasking(1, LAYOUT).begin(LAYOUT.chains(examples), zeros(20_000), 1).masked
    assert not masked[:, 0].any(), "a prompt is never masked"
    counts = np.bincount(masked.sum(dim=1).numpy(), minlength=11)
    assert counts[0] == 0, "no sequence without a mask"
    assert ((counts[1:] - 2000) ** 2 / 2000).sum() < 28, "chi-square with 9 degrees of freedom, p < 0.001"
    share = masked[:, 1:].double().mean(dim=0)
    assert (share - 0.55).abs().max() < 0.015


def test_bernoulli_counts_are_uniform_and_positions_alike() -> None:
    """With t ~ U(0, 1) each number of masks is as likely, given that there is one, and each position."""
    examples = answers_only(20_000, 10)
    objective = RandomMasking(1, LAYOUT, "bernoulli")
    masked = objective.begin(LAYOUT.chains(examples), zeros(20_000), 1).masked[:, 1:]
    weights = objective.weights(
        LAYOUT.chains(examples),
        ChainState(masked=torch.nn.functional.pad(masked, (1, 0)), stage=zeros(20_000)),
    )
    total = weights.amax(dim=1).double() * 20_000 * masked.sum(dim=1)  # sum of the weights of a sequence
    each = torch.stack([total[masked.sum(dim=1) == n].sum() for n in range(1, 11)]) / 20_000
    assert (each - 0.1).abs().max() < 0.01
    share = (masked * total[:, None] / masked.sum(dim=1, keepdim=True)).mean(dim=0)
    assert (share - 0.1).abs().max() < 0.01


@pytest.mark.parametrize("count", ["uniform", "bernoulli"])
def test_strata_cover_the_ratios_evenly(count: str) -> None:
    """In each round of S sequences every interval of width 1/S holds one t; alone they would clump."""
    slots, rounds = 32, 20
    examples = answers_only(slots * rounds, 6)
    objective = RandomMasking(9, LAYOUT, count, strata=slots)  # type: ignore[arg-type]
    chains = LAYOUT.chains(examples)
    ratios = objective.ratio(chains, zeros(slots * rounds)).view(rounds, slots)
    offsets = (ratios * slots % 1.0).numpy()
    assert (np.sort((ratios * slots).long().numpy()) == np.arange(slots)).all()
    assert len(np.unique(offsets[:, 0].round(6))) == rounds, "each round has a shift of its own"
    plain = RandomMasking(9, LAYOUT, count).ratio(chains, zeros(slots * rounds))  # type: ignore[arg-type]
    assert len(np.unique((plain.view(rounds, slots)[0] * slots).long())) < slots


def test_pairs_are_complementary() -> None:
    """The second mask is the complement of the first; a full mask, whose complement is empty, comes twice."""
    examples = answers_only(500, 3)
    objective = RandomMasking(0, LAYOUT, complementary=True)
    first = objective.begin(LAYOUT.chains(examples), zeros(500), 1)
    second, ended, _ = objective.advance(LAYOUT.chains(examples), first, Scores(torch.zeros(1)), 1, 2)
    assert not ended.any()
    full = first.masked.sum(dim=1) == 3
    assert 100 < int(full.sum()) < 250
    assert second.masked[full].equal(first.masked[full])
    assert (second.masked ^ first.masked)[~full].equal(examples.answer[~full])
    _, ended, _ = objective.advance(LAYOUT.chains(examples), second, Scores(torch.zeros(1)), 2, 3)
    assert ended.all()


def test_every_sequence_lasts_one_step() -> None:
    examples = answers_only(4, 3)
    objective = RandomMasking(0, LAYOUT)
    state = objective.begin(LAYOUT.chains(examples), zeros(4), 1)
    _, ended, _ = objective.advance(LAYOUT.chains(examples), state, Scores(torch.zeros(4, 4)), 1, 2)
    assert ended.all()


def test_held_out_masks_are_the_same_in_every_run() -> None:
    """Whatever the seed, the objective and the step: held-out losses can be compared."""
    examples, found = answers_only(50, 9), []
    for seed, step, objective in (
        (1, 1, ObjectiveConfig("random_masking", mask_count="bernoulli", stratified=True)),
        (2, 900, ObjectiveConfig("random_masking", complementary=True)),
        (3, 7, ObjectiveConfig("puma")),
    ):
        config = Config("run", objective=objective, train=TrainConfig(seed=seed))
        layout = build(config, 3, has_padding=False).at(step).layout
        state = held_out_objective(layout).begin(layout.chains(examples), zeros(50), step)
        found.append(state.masked)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])
