"""What a sequence looks like to the chains and to the model: whole, in blocks, or from left to right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import PADDING, Samples
from pipeline.model.batch import MaskedBatch, masked_batch
from pipeline.objectives.base import Chains, positions_like


@dataclass(frozen=True)
class Whole:
    """One chain for the whole answer; every position sees every other.

    Attributes:
        mask_id: the mask token M.
        has_padding: whether the model must be told of padding positions.
        first_given: position 0 is never masked: the model reads a prediction at the position before.
    """

    mask_id: int
    has_padding: bool
    first_given: bool = False

    def chains(self, samples: Samples) -> Chains:
        """See `Layout`."""
        answer = samples.answer
        if self.first_given:
            answer = answer & (positions_like(samples.tokens) > 0)
        return Chains(torch.where(answer, 0, 1), 1)

    def batch(self, samples: Samples, masked: Tensor, weights: Tensor, rows: int, step: int) -> MaskedBatch:
        """See `Layout`."""
        padding = samples.roles == PADDING if self.has_padding else None
        return masked_batch(samples.tokens, masked, rows, self.mask_id, padding, weights)
