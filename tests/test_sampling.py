"""Decoding by top confidence against a plain loop."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.model.batch import Vocabulary
from pipeline.sampling import decode

MASK, SIZE = 3, 12


class HashModel:
    """Logits that depend on the whole row, as a bidirectional model's do; many confidences tie."""

    lm_head = SimpleNamespace(vocabulary=Vocabulary(SIZE, SIZE, MASK))

    def logits(
        self, ids: torch.Tensor, rows: torch.Tensor, attention_mask: torch.Tensor | None
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
