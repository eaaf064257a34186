"""PUMA chains against the NumPy oracle, and the traps that chains can fall into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.examples import ANSWER, PADDING, PROMPT, Examples
from pipeline.objectives.layouts import Whole
from pipeline.objectives.mask_ratio import MaskRatio
from pipeline.objectives.policies import POLICIES
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.seam import ChainState, Scores, take_highest
from pipeline.objectives.stages import StageSchedule
from support import oracles

LAYOUT = Whole(mask_id=3, has_padding=True)
KINDS = ("random", "equal", "one", "near zero", "few values")


schedules = st.builds(
    StageSchedule,
    start=st.integers(1, 12),
    increment=st.integers(0, 4),
    first_increase=st.integers(1, 6),
    interval=st.integers(1, 4),
    maximum=st.integers(12, 20),
)


@dataclass
class Case:
    """A batch of sequences with any layout, and the settings of the chains."""

    examples: Examples
    answers: list[list[int]]
    stages: StageSchedule
    threshold: float | None
    policy: str
    seed: int
    kind: str
    bell: tuple[float, float] | None
    skipped: int
    pool: float

    def objective(self) -> ProgressiveUnmasking:
        """Return what is tested."""
        policy, ratios = POLICIES[self.policy], MaskRatio()
        if self.bell:
            ratios = MaskRatio(mean=self.bell[0], std=self.bell[1])
        return ProgressiveUnmasking(
            self.seed, LAYOUT, self.stages, policy, self.threshold, ratios, self.skipped, self.pool
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw prompts, answers (length 1 and lengths below K included) and paddings of any lengths."""
    rows = draw(st.integers(1, 4))
    shapes = [
        (draw(st.integers(0, 4)), draw(st.integers(1, 14)), draw(st.integers(0, 3))) for _ in range(rows)
    ]
    width = max(map(sum, shapes))
    roles = np.full((rows, width), PADDING, np.int8)
    for row, (prompt, answer, _) in enumerate(shapes):
        roles[row, :prompt] = PROMPT
        roles[row, prompt : prompt + answer] = ANSWER
    tokens = np.random.default_rng(draw(st.integers(0, 99))).integers(5, 30, (rows, width))
    ids = draw(st.lists(st.integers(0, 2**40), min_size=rows, max_size=rows))
    examples = Examples(torch.from_numpy(tokens), torch.from_numpy(roles), torch.tensor(ids))
    return Case(
        examples,
        [list(range(prompt, prompt + answer)) for prompt, answer, _ in shapes],
        draw(schedules),
        draw(st.none() | st.sampled_from([1e-9, 0.3, 0.9, 1 - 1e-7])),
        draw(st.sampled_from(sorted(POLICIES))),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from(KINDS)),
        draw(st.none() | st.sampled_from([(0.5, 0.2), (0.3, 0.1), (0.8, 0.5)])),
        draw(st.integers(0, 3)),
        draw(st.sampled_from([0.0, 0.25, 0.9])),
    )


def scores(case: Case, step: int) -> Scores:
    """Return scores of one of the kinds, ties included."""
    shape = tuple(case.examples.tokens.shape)
    random = np.random.default_rng([case.seed, step])

    def values() -> torch.Tensor:
        kinds = {
            "random": random.random(shape),
            "equal": np.full(shape, 0.5),
            "one": np.ones(shape),
            "near zero": np.full(shape, 1e-6),
            "few values": random.integers(1, 4, shape) / 3,
        }
        return torch.from_numpy(kinds[case.kind].astype(np.float32))

    return Scores(values(), values(), values())


def ranking(case: Case, scores: Scores, row: int) -> dict[int, float]:
    """Return the score of each position of a row that the policy of `case` ranks by, for the oracle."""
    assert scores.margin is not None
    assert scores.entropy is not None
    values = {"margin": scores.margin, "entropy": -scores.entropy}.get(case.policy, scores.confidence)
    return dict(enumerate(values[row].tolist()))


def masked_sets(state: ChainState) -> list[set[int]]:
    """Return the masked positions of each row."""
    return [set(row.nonzero().flatten().tolist()) for row in state.masked]


@settings(deadline=None, max_examples=250)
@given(cases(), st.data())
def test_chains_equal_the_oracle(case: Case, data: st.DataObject) -> None:
    """Start, targets, reveals, threshold, stage and end equal the oracle from any stage to the end.

    For every policy, while K grows or not. On the way: no input without a mask, only answers masked, masks
    never come back, the end within as many steps as K has stages at the most.
    """
    objective = case.objective()
    first_step = data.draw(st.integers(1, 8))
    first = [data.draw(st.integers(0, case.stages(first_step) - 1)) for _ in case.answers]
    state = objective.begin(LAYOUT.chains(case.examples), torch.tensor(first)[:, None], first_step)
    chains = [
        oracles.Chain(
            case.seed,
            example,
            answer,
            case.stages,
            case.threshold,
            case.policy,
            bell=case.bell,
            skipped=case.skipped,
            pool=case.pool,
        )
        for example, answer in zip(case.examples.ids.tolist(), case.answers, strict=True)
    ]
    for chain, stage in zip(chains, first, strict=True):
        chain.begin(stage, first_step)
    bound = case.stages(first_step + 20)
    for step in range(first_step, first_step + bound):
        given_scores = scores(case, step)
        before = masked_sets(state)
        state, ended, _ = objective.advance(LAYOUT.chains(case.examples), state, given_scores, step, step + 1)
        for row, chain in enumerate(chains):
            if chain.ended:
                continue
            assert before[row], "an input without a mask has no loss"
            assert before[row] == chain.masked
            assert before[row] <= set(case.answers[row])
            confidence = dict(enumerate(given_scores.confidence[row].tolist()))
            chain.advance(ranking(case, given_scores, row), confidence, step)
            assert bool(ended[row]) == chain.ended
            if not chain.ended:
                assert masked_sets(state)[row] == chain.masked
                assert masked_sets(state)[row] <= before[row]
                assert int(state.stage[row, 0]) == chain.stage
    assert all(chain.ended for chain in chains), "every chain ends (no livelock)"


@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize("stages", [1, 8, 42])
def test_stage_targets_stay_in_their_stage(length: int, stages: int) -> None:
    """round(r L_eff) with r in [j/K, (j+1)/K), never the last masked token."""
    count = 400
    roles = torch.full((count, length), ANSWER, dtype=torch.int8)
    examples = Examples(torch.zeros(count, length, dtype=torch.int64), roles, torch.arange(count))
    objective = ProgressiveUnmasking(3, LAYOUT, StageSchedule(stages), POLICIES["confidence"])
    for stage in range(stages):
        target = objective.target_count(LAYOUT.chains(examples), torch.full((count, 1), stage), 1)
        low, high = int(stage / stages * length + 0.5), int((stage + 1) / stages * length + 0.5)
        assert (target >= min(low, length - 1)).all()
        assert (target <= min(high, length - 1)).all()
        if stages == 1:
            assert len(target.unique()) == length, "one stage covers every count"


def test_a_threshold_that_reveals_nothing_changes_nothing() -> None:
    """Chains last K steps, also where a rounded count reaches the next stage (L_eff no multiple of K)."""
    count, length, stages = 200, 37, 6
    roles = torch.full((count, length), ANSWER, dtype=torch.int8)
    examples = Examples(torch.zeros(count, length, dtype=torch.int64), roles, torch.arange(count))
    chains = LAYOUT.chains(examples)
    plain, with_threshold = (
        ProgressiveUnmasking(3, LAYOUT, StageSchedule(stages), POLICIES["confidence"], threshold)
        for threshold in (None, 0.9)
    )
    states = [
        each.begin(chains, torch.zeros(count, 1, dtype=torch.int64), 1) for each in (plain, with_threshold)
    ]
    for step in range(1, stages + 1):
        unsure = Scores(torch.rand(count, length, generator=torch.Generator().manual_seed(step)) * 0.8)
        (first, ended, _), (second, also_ended, _) = (
            objective.advance(chains, state, unsure, step, step + 1)
            for objective, state in zip((plain, with_threshold), states, strict=True)
        )
        assert second.stage.equal(first.stage)
        assert second.masked.equal(first.masked)
        assert ended.all() == also_ended.all() == (step == stages)
        states = [first, second]


def test_first_chains_are_staggered() -> None:
    """Every stage is present in a micro-batch of at least K slots, from the first step."""
    objective = ProgressiveUnmasking(0, LAYOUT, StageSchedule(8), POLICIES["confidence"])
    for first_slot in (0, 16, 64):
        stages = objective.first_stage(torch.arange(first_slot, first_slot + 16), 1)
        assert stages.unique().tolist() == list(range(8))


@settings(deadline=None, max_examples=50)
@given(cases())
def test_ranking_never_sees_the_truth(case: Case) -> None:
    """With other true tokens, and the same confidences, a chain is the same."""
    objective = case.objective()
    other = Examples(case.examples.tokens.flip(0) * 0 + 7, case.examples.roles, case.examples.ids)
    stage = torch.zeros(len(case.answers), 1, dtype=torch.int64)
    of_one, of_two = LAYOUT.chains(case.examples), LAYOUT.chains(other)
    one, two = objective.begin(of_one, stage, 1), objective.begin(of_two, stage, 1)
    for step in range(1, 9):
        one, *_ = objective.advance(LAYOUT.chains(case.examples), one, scores(case, step), step, step + 1)
        two, *_ = objective.advance(of_two, two, scores(case, step), step, step + 1)
        assert torch.equal(one.masked, two.masked)


def test_confidences_that_bf16_cannot_tell_apart_are_ranked() -> None:
    """0.9990 and 0.9995 are one number in bf16; as fp32 the higher one is revealed, and ties by position."""
    confidence = torch.tensor([[0.9990, 0.9995, 0.9990, 0.9995]])
    assert confidence.bfloat16().unique().numel() == 1
    everything = torch.ones(1, 4, dtype=torch.bool)
    chosen = [take_highest(everything, confidence, torch.tensor([count]))[0].tolist() for count in (1, 2, 3)]
    assert chosen == [
        [False, True, False, False],
        [False, True, False, True],
        [True, True, False, True],
    ]


def test_scores_of_other_positions_are_ignored() -> None:
    """What stands at positions that are not masked, even infinity or NaN, changes nothing."""
    candidates = torch.tensor([[True, False, True, False]])
    for foreign in (torch.inf, torch.nan, 2.0):
        ranked = torch.tensor([[0.1, foreign, 0.2, foreign]])
        assert take_highest(candidates, ranked, torch.tensor([1]))[0].tolist() == [False, False, True, False]
