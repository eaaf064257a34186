"""The K schedule against the paper's own numbers, and what a growing K means for a chain."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objectives.stages import StageSchedule

PAPER = StageSchedule(start=12, increment=3, first_increase=60_000, interval=30_000, maximum=42)


def test_equals_the_schedule_of_the_paper() -> None:
    """12 stages, 3 more every 30,000 steps from step 60,000, 42 from step 330,000 to the end."""
    for step, stages in [(1, 12), (59_999, 12), (60_000, 15), (89_999, 15), (90_000, 18), (329_999, 39),
                         (330_000, 42), (360_000, 42), (903_000, 42)]:  # fmt: skip
        assert PAPER(step) == stages, step
    assert StageSchedule(8)(10**6) == 8


@given(st.integers(1, 30), st.integers(0, 9), st.integers(1, 9), st.integers(1, 5), st.data())
def test_a_growing_k_moves_boundaries_and_keeps_the_way_done(
    start: int, increment: int, first: int, interval: int, data: st.DataObject
) -> None:
    """The next stage begins where the last one ended, or less than one stage later; no stage comes twice."""
    stages = StageSchedule(start, increment, first, interval, maximum=40)
    step = data.draw(st.integers(1, 30))
    before, after = stages(step), stages(step + 1)
    stage = data.draw(st.integers(0, before - 1))
    following = int(stages.following(torch.tensor([[stage]]), step, step + 1))
    gap = Fraction(following, after) - Fraction(stage + 1, before)
    assert 0 <= gap < Fraction(1, after)
    if before == after:
        assert following == stage + 1
    assert int(stages.following(torch.tensor(before), step, step + 1)) >= after, "an ended chain stays ended"
