"""Clean sequences as tensors, one a slot: what the data side hands to the objectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING, PROMPT, ANSWER = 0, 1, 2


@dataclass
class Samples:
    """One clean sequence for each of B slots.

    Attributes:
        tokens: [B, L] int64, x0.
        roles: [B, L] int8, PADDING, PROMPT or ANSWER; each row has at least one ANSWER.
        ids: [B] int64, unique for each sample and epoch; seeds the noise of the sequence.
    """

    tokens: Tensor
    roles: Tensor
    ids: Tensor

    @property
    def answer(self) -> Tensor:
        """[B, L] bool: the positions that may be masked."""
        return self.roles == ANSWER

    @property
    def answer_length(self) -> Tensor:
        """[B] int64: L_eff."""
        return self.answer.sum(dim=1)

    def replaced(self, where: Tensor, other: Samples) -> Samples:
        """Return the samples with rows `where` [B] bool taken from `other`."""
        rows = where[:, None]
        return Samples(
            torch.where(rows, other.tokens, self.tokens),
            torch.where(rows, other.roles, self.roles),
            torch.where(where, other.ids, self.ids),
        )
