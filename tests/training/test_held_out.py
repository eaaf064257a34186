"""Held-out figures that a run measures while it is trained, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline.data.examples import PADDING
from pipeline.engine.plain import PlainEngine
from pipeline.objectives.layouts import Whole
from pipeline.training.held_out import held_out_bound
from support.synthetic import MASK, Pairs, sharp_engine

SAMPLES = 5


@pytest.fixture
def engine() -> Iterator[PlainEngine]:
    """Return a small model that is far from uniform."""
    with sharp_engine(5) as engine:
        yield engine


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_the_bound_equals_that_of_all_masks(engine: PlainEngine, batch_size: int) -> None:
    """Answers of up to 3 tokens, every mask of each; batches need not divide the examples."""
    data = Pairs(9, longest=3)
    expected, tokens = 0.0, 0
    for number in range(SAMPLES):
        example = data[number]
        answer = np.flatnonzero(example["roles"] == 2).tolist()
        tokens += len(answer)
        for count in range(1, len(answer) + 1):
            masks = list(itertools.combinations(answer, count))
            for mask in masks:
                ids = torch.from_numpy(example["tokens"])[None].clone()
                ids[0, list(mask)] = MASK
                seen = torch.from_numpy(example["roles"] != PADDING)[None]
                logits = engine.model.logits(ids, torch.tensor(mask), seen)  # type: ignore[operator]
                truth = torch.from_numpy(example["tokens"])[list(mask)]
                nll = -torch.log_softmax(logits.double(), dim=-1).gather(1, truth[:, None]).sum()
                expected += float(nll) / count / len(masks)  # L/n of a draw, 1/L of each n
    layout = Whole(MASK, has_padding=True)
    found = held_out_bound(engine, data, SAMPLES, batch_size, layout, 1, draws=8)
    assert found == pytest.approx(expected / tokens, rel=1e-5)


def test_a_stop_gives_up(engine: PlainEngine) -> None:
    layout = Whole(MASK, has_padding=True)
    assert held_out_bound(engine, Pairs(9, longest=3), 5, 2, layout, 1, 2, lambda: True) is None
