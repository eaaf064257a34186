"""The seam between the trainer and a way of masking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.batch import Samples


@dataclass
class ChainState:
    """Where each of B chains stands.

    Attributes:
        masked: [B, L] bool, the positions of the next input that hold the mask token; at least one a row.
        stage: [B] int64.
    """

    masked: Tensor
    stage: Tensor

    def replaced(self, where: Tensor, other: ChainState) -> ChainState:
        """Return the state with rows `where` [B] bool taken from `other`."""
        return ChainState(
            torch.where(where[:, None], other.masked, self.masked),
            torch.where(where, other.stage, self.stage),
        )


class Objective(Protocol):
    """Decides which positions of each sequence are masked, from one training step to the next.

    All methods are pure functions of their arguments, run on the device of their tensors and never wait for
    it, so a chain is the same whatever rank, device or run holds it.
    """

    def first_stage(self, slots: Tensor) -> Tensor:
        """Return the stage [B] int64 at which the very first chain of each slot [B] starts."""

    def begin(self, samples: Samples, stage: Tensor) -> ChainState:
        """Return the state of new chains that start at `stage` [B], before the model has seen them."""

    def advance(self, samples: Samples, state: ChainState, confidence: Tensor) -> tuple[ChainState, Tensor]:
        """Move every chain on after a training step.

        Args:
            samples: the clean sequences.
            state: the state that the step was trained on.
            confidence: [B, L] float32, max_v p(v | xt) at masked positions; other positions are ignored.

        Returns:
            The next state, and [B] bool: chains that have ended, whose state the caller replaces.
        """


def positions_like(tokens: Tensor) -> Tensor:
    """Return [1, L] int64 positions for tokens [B, L]."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def take_highest(candidates: Tensor, scores: Tensor, count: Tensor) -> Tensor:
    """Choose in each row the `count` candidates with the highest scores; ties go to the lower position.

    Args:
        candidates: [B, L] bool.
        scores: [B, L] float32 or float64; bf16 would tie where the model does not.
        count: [B] int64, any value; at most all candidates of the row are chosen.

    Returns:
        [B, L] bool, a subset of `candidates`.
    """
    ranked = scores.masked_fill(~candidates, -torch.inf)
    order = torch.argsort(ranked, dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return candidates & (rank < count[:, None])
