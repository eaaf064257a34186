"""Counter-based noise against Python's own integers, and its statistics."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.objectives import noise
from support import oracles

counters = st.integers(0, 2**62)


@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.lists(counters, min_size=1, max_size=4))
def test_equals_splitmix64_in_python_integers(seed: int, purpose: int, values: list[int]) -> None:
    number = noise.uniform(seed, purpose, *(torch.tensor(value) for value in values))
    assert number.item() == oracles.uniform(seed, purpose, *values)


def test_broadcasts_and_every_argument_counts() -> None:
    examples, positions = torch.arange(50)[:, None], torch.arange(40)[None]
    grid = noise.uniform(1, 2, examples, positions)
    assert grid.shape == (50, 40)
    assert grid.unique().numel() == 2000
    for other in (noise.uniform(2, 2, examples, positions), noise.uniform(1, 3, examples, positions)):
        assert not (grid == other).any()


def test_is_uniform_and_neighbours_are_independent() -> None:
    numbers = noise.uniform(7, 1, torch.arange(1000)[:, None], torch.arange(100)[None]).numpy()
    observed, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert ((observed - 1000) ** 2 / 1000).sum() < 150, "chi-square with 99 degrees of freedom, p < 0.001"
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.015
