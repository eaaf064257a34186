"""Autoregressive training: every answer position is predicted from the positions before it."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objectives.seam import Chains, ChainState, Layout, Reveals, Scores, mean_over_chains


class Autoregressive:
    """Every answer position is in the loss, and every sequence lasts one step. The layout is causal."""

    needs: tuple[str, ...] = ()

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

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
