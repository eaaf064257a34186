"""Decoding state of the sequences of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.examples import PADDING, Examples
from pipeline.model.batch import Visibility

UNFILLED = -1


def numbered(answer: Tensor, size: int) -> Tensor:
    """Return the block of each position, [B, L] int64: those of `answer` from 1 on, 0 elsewhere."""
    return torch.where(answer, (answer.cumsum(dim=1) - 1) // size + 1, 0)


@dataclass
class Sequences:
    """Decoding state of B unfinished sequences.

    Attributes:
        rows: [B] int64, the row of each sequence in the caller's batch.
        examples: tokens (ignored at masked positions), roles and ids.
        answer: [B, L] bool, positions masked at the start.
        masked: [B, L] bool, positions masked now.
        order: [B, L] int64, the step at which each position was filled; UNFILLED elsewhere.
        blocks: [B, L] int64, the block of each position; blocks are filled one after another.
        began: [B] int64, the first step of the current block.
        step: number of finished steps.
    """

    rows: Tensor
    examples: Examples
    answer: Tensor
    masked: Tensor
    order: Tensor
    blocks: Tensor
    began: Tensor
    step: int = 0

    @classmethod
    def start(
        cls, examples: Examples, masked: Tensor, visibility: Visibility, block_size: int | None
    ) -> Sequences:
        """Return the state before the first step.

        Args:
            examples: B sequences.
            masked: [B, L] bool.
            visibility: its blocks are filled one after another.
            block_size: masked tokens per block if `visibility` has no blocks; None = one block.
        """
        size = block_size or masked.shape[1]
        blocks = numbered(masked, size)
        if visibility.blocks is not None:
            blocks = visibility.blocks.expand_as(masked)
        rows = torch.arange(len(masked), device=masked.device)
        unfilled = torch.full_like(examples.tokens, UNFILLED)
        return cls(rows, examples, masked, masked, unfilled, blocks, torch.zeros_like(rows))

    @property
    def present(self) -> Tensor:
        """[B, L] bool: positions that are not padding."""
        return self.examples.roles != PADDING

    def inputs(self, mask_id: int) -> Tensor:
        """Return xt, [B, L] int64."""
        return self.examples.tokens.masked_fill(self.masked, mask_id)

    def candidates(self, stop: int | None) -> Tensor:
        """Return the positions that may be filled now, [B, L] bool; a row without candidates is finished.

        Candidates are the masked positions of the first block that has any. Positions after a filled `stop`
        token are excluded: they are not part of the answer.
        """
        left = self.masked
        if stop is not None:
            stops = (self.order != UNFILLED) & ~self.masked & (self.examples.tokens == stop)
            left = left & (stops.cumsum(dim=1) == 0)
        blocks = torch.where(left, self.blocks, self.blocks.max() + 1)
        return left & (blocks == blocks.amin(dim=1, keepdim=True))

    def kept(self, keep: Tensor) -> Sequences:
        """Return a copy of the rows where `keep` [B] bool is True."""
        rows, answer, masked, order, blocks, began = (
            x[keep] for x in (self.rows, self.answer, self.masked, self.order, self.blocks, self.began)
        )
        examples = self.examples.mapped(lambda x: x[keep])
        return Sequences(rows, examples, answer, masked, order, blocks, began, self.step)
