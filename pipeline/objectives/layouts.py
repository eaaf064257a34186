"""Layouts: sequences as one chain, in blocks, or from left to right.

Documents that are kept apart (`Examples.documents`) are laid out as if each were a sequence of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.data.examples import PADDING, Examples
from pipeline.model.batch import MaskedBatch, Visibility, masked_batch
from pipeline.objectives import noise
from pipeline.objectives.seam import Attention, Chains, positions_like


@dataclass(frozen=True)
class Whole:
    """One chain for the whole answer; attention is bidirectional, or becomes so during annealing.

    Attributes:
        mask_id: the mask token M.
        has_padding: whether the model needs a padding mask.
        first_given: the first position of a document is never masked, since a shifted model predicts a token
            at the one before.
        annealing_steps: steps from causal to bidirectional attention (DiffuLLaMA, arXiv 2410.17891).
        annealing_start: first of these steps.
        seed: seed of the attention during annealing.
    """

    mask_id: int
    has_padding: bool
    first_given: bool = False
    annealing_steps: int = 0
    annealing_start: int = 1
    seed: int = 0
    attention: ClassVar[Attention] = "bidirectional"

    def chains(self, examples: Examples) -> Chains:
        return Chains(examples, torch.where(self.answer(examples), 0, 1), 1)

    def answer(self, examples: Examples) -> Tensor:
        """Return the positions that may be masked, [B, L] bool."""
        return examples.answer & ~examples.starts if self.first_given else examples.answer

    def batch(self, examples: Examples, masked: Tensor, weights: Tensor, rows: int, step: int) -> MaskedBatch:
        padding = examples.roles == PADDING if self.has_padding else None
        batch = masked_batch(examples.tokens, masked, rows, self.mask_id, padding, weights)
        return batch._replace(visibility=self.annealed(examples, step)._replace(documents=examples.documents))

    def annealed(self, examples: Examples, step: int) -> Visibility:
        """Return the attention at `step` of the annealing.

        A position sees each later one with a probability that grows from 0 to 1. It is drawn anew at each
        step, for all sequences at once.
        """
        done = step - self.annealing_start
        if done >= self.annealing_steps:
            return Visibility()
        positions = positions_like(examples.tokens)  # [1, L]
        counter = torch.full_like(positions, step)
        drawn = noise.uniform(self.seed, noise.ANNEALED_ATTENTION, counter, positions.T, positions)  # [L, L]
        return Visibility(positions, also_visible=drawn < done / self.annealing_steps)

    def decoding(self, examples: Examples) -> Visibility:
        return Visibility(documents=examples.documents)


@dataclass(frozen=True)
class Blocks(Whole):
    """Block diffusion: one chain per block of the answer, conditioned on the clean blocks before it.

    All blocks are trained in one forward on [xt ; x0] (BD3-LM, arXiv 2503.09573).

    Attributes:
        size: tokens of a block; the last block of an answer, or of a document, may be shorter.
    """

    size: int = 1
    attention: ClassVar[Attention] = "blocks"

    def chains(self, examples: Examples) -> Chains:
        answer, length = self.answer(examples), examples.tokens.shape[1]
        count = -(-length // self.size) if examples.documents is None else length  # one token a document
        before = answer.cumsum(dim=1) - answer.long()  # answer positions before each position
        if examples.documents is not None:  # those of its document alone
            documents = examples.documents.long()
            each = torch.zeros_like(before).scatter_add_(1, documents, answer.long())  # of each document
            before = before - (each.cumsum(dim=1) - each).gather(1, documents)
        begins = answer & (before % self.size == 0)
        return Chains(examples, torch.where(answer, begins.cumsum(dim=1) - 1, count), count)

    def batch(self, examples: Examples, masked: Tensor, weights: Tensor, rows: int, step: int) -> MaskedBatch:
        batch = super().batch(examples, masked, weights, rows, step)
        visibility = self.decoding(examples)._replace(clean_ids=examples.tokens)
        return batch._replace(visibility=visibility)

    def decoding(self, examples: Examples) -> Visibility:
        """See `Layout`; the prompt is one block before the others, the padding one after them."""
        chains = self.chains(examples)
        outside = torch.where(examples.roles == PADDING, chains.count + 1, 0)
        blocks = torch.where(chains.answer, chains.index + 1, outside)
        return Visibility(blocks, documents=examples.documents)


@dataclass(frozen=True)
class LeftToRight(Whole):
    """Causal attention over the true tokens: each position is predicted from those before it."""

    attention: ClassVar[Attention] = "causal"

    def batch(self, examples: Examples, masked: Tensor, weights: Tensor, rows: int, step: int) -> MaskedBatch:
        """See `Layout`; the input has no masks, since no position sees the token that it predicts."""
        batch = super().batch(examples, masked, weights, rows, step)
        return batch._replace(input_ids=examples.tokens, visibility=self.decoding(examples))

    def decoding(self, examples: Examples) -> Visibility:
        return Visibility(positions_like(examples.tokens), documents=examples.documents)
