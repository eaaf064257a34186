"""PUMA chains, with a share of the sequences under random masks instead."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.objectives import noise
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.random_masking import RandomMasking
from pipeline.objectives.seam import Chains, ChainState, Reveals, Scores


class Mixture:
    """A share of the sequences, chosen by their noise, shows a fresh random mask at each stage.

    They last as many stages as a chain of standard mode, so the share holds for sequences and training inputs
    alike. With a threshold chains are shorter, and the random share of the inputs is larger.
    """

    def __init__(self, chains: ProgressiveUnmasking, random: RandomMasking, share: float) -> None:
        """Mix `chains` with a share (0 to 1) of `random`, which has the same layout."""
        self.progressive = chains
        self.random = random
        self.share = share
        self.layout = chains.layout
        self.needs = chains.needs

    def is_random(self, examples: Examples) -> Tensor:
        """Return the sequences under random masks, [B] bool."""
        return noise.uniform(self.progressive.seed, noise.MIXTURE, examples.ids) < self.share

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return staggered stages [B]."""
        return self.progressive.first_stage(slots, step)

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Begin both kinds, each for its own sequences."""
        random = self.random.begin(chains, stage, step)
        return self.progressive.begin(chains, stage, step).replaced(self.is_random(chains.examples), random)

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return the weights of both kinds, each for its own sequences."""
        random, progressive = self.random.weights(chains, state), self.progressive.weights(chains, state)
        return torch.where(self.is_random(chains.examples)[:, None], random, progressive)

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Advance the chains, and draw the random masks of the next stage."""
        progressive, ended, reveals = self.progressive.advance(chains, state, scores, step, next_step)
        stages = self.progressive.stages
        stage = self.progressive.following(chains, state.stage, step, next_step)
        random = self.random.begin(chains, stage, next_step)
        where = self.is_random(chains.examples)
        ended = torch.where(where, stage[:, 0] >= stages(next_step), ended)
        assert reveals is not None
        of_progressive = Reveals(*(count.masked_fill(where, 0) for count in reveals))
        return progressive.replaced(where, random), ended, of_progressive
