"""Chains of PUMA mixed with a share of sequences under random masks."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.objectives import noise
from pipeline.objectives.objective import ChainState, Objective, Reveals, Scores
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
        self.chains = chains
        self.random = random
        self.share = share
        self.layout = chains.layout
        self.needs = chains.needs

    def is_random(self, examples: Examples) -> Tensor:
        """Return [B] bool: the sequences under random masks."""
        return noise.uniform(self.chains.seed, noise.MIXTURE, examples.ids) < self.share

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return staggered stages [B]."""
        return self.chains.first_stage(slots, step)

    def begin(self, examples: Examples, stage: Tensor, step: int) -> ChainState:
        """Return the beginnings of both kinds, each where it belongs."""
        random = self.random.begin(examples, stage, step)
        return self.chains.begin(examples, stage, step).replaced(self.is_random(examples), random)

    def weights(self, examples: Examples, state: ChainState) -> Tensor:
        """Return the weights of both kinds, each where it belongs."""
        random, chains = self.random.weights(examples, state), self.chains.weights(examples, state)
        return torch.where(self.is_random(examples)[:, None], random, chains)

    def advance(
        self, examples: Examples, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Move the chains on, and draw the random masks of the next stage."""
        chains, ended, reveals = self.chains.advance(examples, state, scores, step, next_step)
        stages = self.chains.stages
        stage = stages.following(state.stage, step, next_step)
        random = self.random.begin(examples, stage, next_step)
        where = self.is_random(examples)
        ended = torch.where(where, stage[:, 0] >= stages(next_step), ended)
        assert reveals is not None
        of_chains = Reveals(*(count.masked_fill(where, 0) for count in reveals))
        return chains.replaced(where, random), ended, of_chains

    def held_out(self) -> Objective:
        """Return random masking with the masks of every held-out loss."""
        return self.chains.held_out()
