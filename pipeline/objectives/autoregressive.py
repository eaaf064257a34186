"""Autoregressive training: every answer position is predicted from the positions before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.objectives.seam import Chains, ChainState, Layout, Reveals, Scores, mean_over_chains


@dataclass(frozen=True)
class Autoregressive:
    """Every answer position is in the loss, and every sequence lasts one step. The layout is causal."""

    layout: Layout
    needs: ClassVar[tuple[str, ...]] = ()

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return zeros [B]: there are no stages."""
        return torch.zeros_like(slots)

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Return every answer position."""
        return ChainState(chains.answer, stage)

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return 1 / L_eff, averaged over sequences."""
        return mean_over_chains(chains, state.masked)

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """End every sequence."""
        return state, torch.ones_like(chains.examples.ids, dtype=torch.bool), None
