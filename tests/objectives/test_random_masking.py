"""Random masking against the NumPy oracle, and its distribution."""

from __future__ import annotations

import numpy as np
import oracles
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import ANSWER, PROMPT, Samples
from pipeline.objectives.base import Scores
from pipeline.objectives.layouts import Whole
from pipeline.objectives.random_masking import RandomMasking

LAYOUT = Whole(mask_id=3, has_padding=False)


def zeros(count: int) -> torch.Tensor:
    """Return the first stage [B, 1] of `count` sequences."""
    return torch.zeros(count, 1, dtype=torch.int64)


def answers_only(count: int, length: int) -> Samples:
    """Return `count` sequences of one prompt token and `length` answer tokens."""
    roles = torch.full((count, 1 + length), ANSWER, dtype=torch.int8)
    roles[:, 0] = PROMPT
    return Samples(torch.zeros(count, 1 + length, dtype=torch.int64), roles, torch.arange(count))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 20), st.integers(0, 10_000))
def test_equals_the_oracle(length: int, seed: int) -> None:
    samples = answers_only(5, length)
    state = RandomMasking(seed, LAYOUT).begin(samples, zeros(5), 1)
    for row in range(5):
        expected = oracles.random_mask(seed, row, list(range(1, length + 1)))
        assert set(state.masked[row].nonzero().flatten().tolist()) == expected


def test_count_and_positions_are_uniform() -> None:
    samples = answers_only(20_000, 10)
    masked = RandomMasking(1, LAYOUT).begin(samples, zeros(20_000), 1).masked
    assert not masked[:, 0].any(), "a prompt is never masked"
    counts = np.bincount(masked.sum(dim=1).numpy(), minlength=11)
    assert counts[0] == 0, "no sequence without a mask"
    assert ((counts[1:] - 2000) ** 2 / 2000).sum() < 28, "chi-square with 9 degrees of freedom, p < 0.001"
    share = masked[:, 1:].double().mean(dim=0)
    assert (share - 0.55).abs().max() < 0.015


def test_every_sequence_lasts_one_step() -> None:
    samples = answers_only(4, 3)
    objective = RandomMasking(0, LAYOUT)
    state = objective.begin(samples, zeros(4), 1)
    _, ended = objective.advance(samples, state, Scores(torch.zeros(4, 4)), 1)
    assert ended.all()
