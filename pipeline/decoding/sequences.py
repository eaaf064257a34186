"""Where the sequences of a batch stand on their way from masks to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.examples import PADDING, Examples
from pipeline.model.batch import Visibility

UNFILLED = -1


@dataclass
class Sequences:
    """B sequences that are being filled; those that are done have left.

    Attributes:
        rows: [B] int64, which row of the caller's batch each is.
        examples: tokens, of which those at masked positions mean nothing, roles, and the prompts' numbers.
        answer: [B, L] bool, what was to be filled.
        masked: [B, L] bool, what is still to be filled.
        order: [B, L] int64, the step at which each position was filled; UNFILLED elsewhere.
        blocks: [B, L] int64, the block of each position: blocks are filled one after another.
        began: [B] int64, the step at which the current block began.
        step: how many steps there have been.
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
        """Return sequences before the first step.

        Args:
            examples: B sequences.
            masked: [B, L] bool.
            visibility: its blocks are filled one after another.
            block_size: where it has none, masked tokens of a block; none = all of them.
        """
        size = block_size or masked.shape[1]
        blocks = torch.where(masked, (masked.cumsum(dim=1) - 1) // size + 1, 0)
        if visibility.blocks is not None:
            blocks = visibility.blocks.expand_as(masked)
        rows = torch.arange(len(masked), device=masked.device)
        unfilled = torch.full_like(examples.tokens, UNFILLED)
        return cls(rows, examples, masked, masked, unfilled, blocks, torch.zeros_like(rows))

    @property
    def present(self) -> Tensor:
        """[B, L] bool: what is no padding."""
        return self.examples.roles != PADDING

    def inputs(self, mask_id: int) -> Tensor:
        """Return xt, [B, L] int64."""
        return self.examples.tokens.masked_fill(self.masked, mask_id)

    def candidates(self, stop: int | None) -> Tensor:
        """Return what may be filled now, [B, L] bool: a row without candidates is done.

        These are the masked positions of the first block that has any. Positions behind a token `stop` that
        has been filled in are none: they are no part of the answer.
        """
        left = self.masked
        if stop is not None:
            stops = (self.order != UNFILLED) & ~self.masked & (self.examples.tokens == stop)
            left = left & (stops.cumsum(dim=1) == 0)
        blocks = torch.where(left, self.blocks, self.blocks.max() + 1)
        return left & (blocks == blocks.amin(dim=1, keepdim=True))

    def kept(self, keep: Tensor) -> Sequences:
        """Return a copy of the rows where `keep` [B] bool holds."""
        tokens, roles, ids = (x[keep] for x in (self.examples.tokens, self.examples.roles, self.examples.ids))
        rows, answer, masked, order, blocks, began = (
            x[keep] for x in (self.rows, self.answer, self.masked, self.order, self.blocks, self.began)
        )
        examples = Examples(tokens, roles, ids)
        return Sequences(rows, examples, answer, masked, order, blocks, began, self.step)
