"""Autoregressive training: every answer position is predicted from those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objectives.objective import (
    Chains,
    ChainState,
    Layout,
    Objective,
    Reveals,
    Scores,
    mean_over_chains,
)


class Autoregressive:
    """All answer positions are in the loss; every sequence lasts one step. The layout is causal."""

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
        """Return 1/L_eff, shared out equally over sequences."""
        return mean_over_chains(chains, state.masked)

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Change nothing and end every sequence."""
        return state, torch.ones_like(chains.examples.ids, dtype=torch.bool), None

    def held_out(self) -> Objective:
        """Return this objective: its loss is the exact negative log-likelihood, divided by L_eff."""
        return self
