"""Random masking against the NumPy oracle, and its distribution."""

from __future__ import annotations

import numpy as np
import oracles
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import ANSWER, PROMPT, Samples
from pipeline.objectives.random_masking import RandomMasking


def answers_only(count: int, length: int) -> Samples:
    """Return `count` sequences of one prompt token and `length` answer tokens."""
    roles = torch.full((count, 1 + length), ANSWER, dtype=torch.int8)
    roles[:, 0] = PROMPT
    return Samples(torch.zeros(count, 1 + length, dtype=torch.int64), roles, torch.arange(count))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 20), st.integers(0, 10_000))
def test_equals_the_oracle(length: int, seed: int) -> None:
    samples = answers_only(5, length)
    state = RandomMasking(seed).begin(samples, torch.zeros(5, dtype=torch.int64))
    for row in range(5):
        expected = oracles.random_mask(seed, row, list(range(1, length + 1)))
        assert set(state.masked[row].nonzero().flatten().tolist()) == expected


def test_count_and_positions_are_uniform() -> None:
    samples = answers_only(20_000, 10)
    masked = RandomMasking(1).begin(samples, torch.zeros(20_000, dtype=torch.int64)).masked
    assert not masked[:, 0].any(), "a prompt is never masked"
    counts = np.bincount(masked.sum(dim=1).numpy(), minlength=11)
    assert counts[0] == 0, "no sequence without a mask"
    assert ((counts[1:] - 2000) ** 2 / 2000).sum() < 28, "chi-square with 9 degrees of freedom, p < 0.001"
    share = masked[:, 1:].double().mean(dim=0)
    assert (share - 0.55).abs().max() < 0.015


def test_every_sequence_lasts_one_step() -> None:
    samples = answers_only(4, 3)
    objective = RandomMasking(0)
    state = objective.begin(samples, objective.first_stage(torch.arange(4)))
    _, ended = objective.advance(samples, state, torch.zeros(4, 4))
    assert ended.all()
