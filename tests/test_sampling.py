"""Decoding by top confidence against a plain loop."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.data.batch import ANSWER, PROMPT, Samples
from pipeline.model.batch import Visibility, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole
from pipeline.sampling import decode

MASK, SIZE = 3, 12


class HashModel:
    """Logits that depend on the whole row, as a bidirectional model's do; many confidences tie."""

    lm_head = SimpleNamespace(vocabulary=Vocabulary(SIZE, SIZE, MASK))

    def logits(
        self,
        ids: torch.Tensor,
        rows: torch.Tensor,
        attention_mask: torch.Tensor | None,
        visibility: Visibility,
    ) -> torch.Tensor:
        values = [self.one(ids[row // ids.shape[1]].numpy(), int(row % ids.shape[1])) for row in rows]
        return torch.tensor(np.stack(values), dtype=torch.float32)

    @staticmethod
    def one(row: np.ndarray, position: int) -> np.ndarray:
        """Return the logits of one position."""
        key = int((row * np.arange(1, len(row) + 1)).sum()) * 31 + position // 2
        logits = np.random.default_rng(key % 7).permutation(SIZE) / 2.0
        logits[MASK] = -np.inf
        return logits


def plain(row: np.ndarray, masked: set[int], per_step: int) -> np.ndarray:
    """Decode one row with a loop."""
    row, masked = row.copy(), set(masked)
    while masked:
        seen = row.copy()
        seen[list(masked)] = MASK
        found = []
        for position in sorted(masked):
            logits = HashModel.one(seen, position)
            probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            found.append((-np.float32(probabilities.max()), position, int(logits.argmax())))
        for _, position, token in sorted(found)[:per_step]:
            row[position] = token
            masked.remove(position)
    return row


@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_equals_a_plain_loop(per_step: int) -> None:
    """Rows with different numbers of masks, none included, give what each row alone gives."""
    random = np.random.default_rng(per_step)
    tokens = random.integers(4, SIZE, (6, 9))
    masked = random.random((6, 9)) < np.array([0, 0.2, 0.5, 0.7, 0.9, 1.0])[:, None]
    result = decode(HashModel(), torch.from_numpy(tokens), torch.from_numpy(masked), per_step)  # type: ignore[arg-type]
    for row in range(6):
        expected = plain(tokens[row], set(np.flatnonzero(masked[row]).tolist()), per_step)
        np.testing.assert_array_equal(result[row], expected)
    assert not (result == MASK).any()


class Reversed:
    """A model that is surer of later positions, and remembers which it was asked for."""

    lm_head = SimpleNamespace(vocabulary=Vocabulary(SIZE, SIZE, MASK))

    def __init__(self) -> None:
        self.filled: list[list[int]] = []

    def logits(
        self,
        ids: torch.Tensor,
        rows: torch.Tensor,
        attention_mask: torch.Tensor | None,
        visibility: Visibility,
    ) -> torch.Tensor:
        self.filled.append((rows % ids.shape[1]).tolist())
        logits = torch.zeros(len(rows), SIZE)
        logits[:, MASK] = -torch.inf
        logits[torch.arange(len(rows)), 4 + rows % 7] = 1.0 + rows / 10
        return logits


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        (Whole(MASK, False), [[1, 2, 3, 4, 5], [1, 2, 3], [1]]),
        (Blocks(MASK, False, size=3), [[1, 2, 3], [1], [4, 5]]),
        (LeftToRight(MASK, False, first_given=True), [[1], [2], [3], [4], [5]]),
    ],
    ids=["whole", "blocks", "left-to-right"],
)
def test_blocks_are_filled_one_after_another(layout: Whole, order: list[list[int]]) -> None:
    """Two tokens a step, the most confident first, none behind a block that still has masks."""
    tokens = torch.tensor([[5, 0, 0, 0, 0, 0]])
    masked = torch.tensor([[False, True, True, True, True, True]])
    roles = torch.where(masked, ANSWER, PROMPT)
    model = Reversed()
    result = decode(model, tokens, masked, 2, None, layout.decoding(Samples(tokens, roles, torch.zeros(1))))  # type: ignore[arg-type]
    assert model.filled == order
    assert result.tolist() == [[5, *(4 + i % 7 for i in range(1, 6))]]


@pytest.mark.parametrize("kind", ["blocks", "left-to-right"])
def test_decoding_sees_what_training_showed(kind: str) -> None:
    """Greedy decoding of a real model equals a loop that only ever has the tokens up to the current block."""
    torch.manual_seed(2)
    config = ModelConfig(
        layers=2, hidden_size=32, heads=4, intermediate_size=48, init_std=0.4, prediction="shifted"
    )
    model = MaskedDiffusionModel(config, Vocabulary(SIZE, SIZE, MASK)).eval()
    layout = LeftToRight(MASK, False, True) if kind == "left-to-right" else Blocks(MASK, False, True, size=3)
    tokens = torch.randint(4, SIZE, (1, 9))
    masked = torch.arange(9)[None] >= 2
    samples = Samples(tokens, torch.where(masked, ANSWER, PROMPT), torch.zeros(1))
    visibility = layout.decoding(samples)
    result = decode(model, tokens, masked, 1, None, visibility)
    assert visibility.blocks is not None
    expected, width = tokens.clone(), 1 if kind == "left-to-right" else 3
    for start in range(2, 9, width):
        end = min(9, start + width)
        left = set(range(start, end))
        while left:
            ids = expected[:, :end].clone()
            ids[0, sorted(left)] = MASK
            blocks = visibility.blocks[:, :end]
            with torch.no_grad():
                hidden = model.model(ids, None, Visibility(blocks))[0]
                p = model.lm_head.logits(hidden[[i - 1 for i in sorted(left)]]).softmax(-1)
            best = int(p.amax(-1).argmax())
            position = sorted(left)[best]
            expected[0, position] = int(p[best].argmax())
            left.remove(position)
    assert result.equal(expected)
