"""Chains of PUMA mixed with a share of sequences under random masks."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.objectives import noise
from pipeline.objectives.objective import Chains, ChainState, Objective, Reveals, Scores
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.random_masking import RandomMasking


class Mixture:
    """A given share of the sequences, decided for each by its noise, shows a fresh random mask at each stage.

    They last as many stages as a chain of standard mode, so the share is that of the sequences and of the
    training inputs alike, and both kinds use their sequences at the same rate. With a threshold chains are
    shorter, and the random share of the inputs is larger than that of the sequences.
    """

    def __init__(self, chains: ProgressiveUnmasking, random: RandomMasking, share: float) -> None:
        """Mix `chains` with `share` (0 to 1) of `random`; both have the same layout."""
        self.progressive = chains
        self.random = random
        self.share = share
        self.layout = chains.layout
        self.needs = chains.needs

    def is_random(self, examples: Examples) -> Tensor:
        """Return [B] bool: the sequences under random masks."""
        return noise.uniform(self.progressive.seed, noise.MIXTURE, examples.ids) < self.share

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return staggered stages [B]."""
        return self.progressive.first_stage(slots, step)

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Return the beginnings of both kinds, each where it belongs."""
        random = self.random.begin(chains, stage, step)
        return self.progressive.begin(chains, stage, step).replaced(self.is_random(chains.examples), random)

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return the weights of both kinds, each where it belongs."""
        random, progressive = self.random.weights(chains, state), self.progressive.weights(chains, state)
        return torch.where(self.is_random(chains.examples)[:, None], random, progressive)

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Move the chains on, and draw the random masks of the next stage."""
        progressive, ended, reveals = self.progressive.advance(chains, state, scores, step, next_step)
        stages = self.progressive.stages
        stage = stages.following(state.stage, step, next_step)
        random = self.random.begin(chains, stage, next_step)
        where = self.is_random(chains.examples)
        ended = torch.where(where, stage[:, 0] >= stages(next_step), ended)
        assert reveals is not None
        of_progressive = Reveals(*(count.masked_fill(where, 0) for count in reveals))
        return progressive.replaced(where, random), ended, of_progressive

    def held_out(self) -> Objective:
        """Return random masking with the masks of every held-out loss."""
        return self.progressive.held_out()
