"""A distribution over short sequences that is known exactly, and models that know it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.model.batch import HeadOutput, MaskedBatch, Visibility, Vocabulary
from pipeline.model.masked_head import MaskedHead

MASK, FIRST = 0, 1  # tokens FIRST, FIRST + 1, ... of the joint distribution


class Joint:
    """p(x) over `size`^`length` sequences, drawn at random; conditionals by adding up."""

    def __init__(self, size: int, length: int, seed: int = 0) -> None:
        self.size, self.length = size, length
        self.p = np.random.default_rng(seed).dirichlet(np.full(size**length, 0.5)).reshape((size,) * length)

    def probability(self, tokens: np.ndarray, known: Iterable[int]) -> float:
        """Return the probability that the positions `known` hold these tokens."""
        known = set(known)
        index = tuple(int(tokens[i]) - FIRST if i in known else slice(None) for i in range(self.length))
        return float(self.p[index].sum())

    def conditional(self, tokens: np.ndarray, known: Iterable[int], position: int) -> np.ndarray:
        """Return p(x_position | x_known), [size]."""
        known = set(known) - {position}
        row = np.array(tokens)
        found = []
        for value in range(self.size):
            row[position] = FIRST + value
            found.append(self.probability(row, known | {position}))
        return np.array(found) / sum(found)


def known_to(batch: MaskedBatch, row: int, position: int) -> tuple[np.ndarray, list[int]]:
    """Return what the model may use at a position: the tokens, and those that it sees."""
    tokens = batch.input_ids[row].numpy().copy()
    everywhere = range(len(tokens))
    blocks, clean_ids = batch.visibility.blocks, batch.visibility.clean_ids
    if blocks is None:
        return tokens, [i for i in everywhere if tokens[i] != MASK]
    block = blocks.expand_as(batch.input_ids)[row].numpy()
    if clean_ids is None:  # from left to right: x0 is there, and position i is read at i - 1
        return tokens, [i for i in everywhere if block[i] < block[position]]
    own = [i for i in everywhere if block[i] == block[position] and tokens[i] != MASK]
    before = [i for i in everywhere if block[i] < block[position]]
    tokens[before] = clean_ids[row].numpy()[before]
    return tokens, own + before


def evaluator(joint: Joint):  # type: ignore[no-untyped-def]
    """Return what runs a `MaskedBatch` with the true conditionals."""

    def evaluate(batch: MaskedBatch) -> HeadOutput:
        nll = []
        for place, target in zip(batch.rows.tolist(), batch.targets.tolist(), strict=True):
            row, position = divmod(place, joint.length)
            tokens, known = known_to(batch, row, position)
            nll.append(-np.log(joint.conditional(tokens, known, position)[target - FIRST]))
        values = torch.tensor(np.array(nll), dtype=torch.float32)
        return HeadOutput((values * batch.weights).sum(), values, torch.exp(-values))

    return evaluate


class ExactModel:
    """A network with the true conditionals: its hidden states are log-probabilities, its head passes them."""

    shifted = False

    def __init__(self, joint: Joint) -> None:
        self.joint = joint
        rows = FIRST + joint.size
        self.lm_head = MaskedHead(nn.Parameter(torch.eye(rows)), Vocabulary(rows, rows, MASK))
        self.known: dict[tuple[int, ...], np.ndarray] = {}

    def model(self, ids: Tensor, attention_mask: Tensor | None, visibility: Visibility) -> Tensor:
        """Return hidden states [B, L, H]."""
        return torch.tensor(np.stack([self.one(tuple(row)) for row in ids.tolist()]), dtype=torch.float32)

    def one(self, row: tuple[int, ...]) -> np.ndarray:
        """Return the hidden states [L, H] of a row."""
        if row not in self.known:
            seen = [i for i, token in enumerate(row) if token != MASK]
            hidden = np.zeros((self.joint.length, FIRST + self.joint.size))
            for i in range(self.joint.length):
                hidden[i, FIRST:] = np.log(self.joint.conditional(np.array(row), seen, i))
            self.known[row] = hidden
        return self.known[row]

    def outputs_of(self, rows: Tensor, length: int, visibility: Visibility) -> Tensor:
        """Predict positions where they are."""
        return rows
