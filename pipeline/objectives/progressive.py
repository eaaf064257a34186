"""PUMA, progressive unmasking (arXiv 2602.10314): chains that follow the model's own order of unmasking."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.batch import Samples
from pipeline.objectives import noise
from pipeline.objectives.base import ChainState, positions_like, take_highest


class ProgressiveUnmasking:
    """Teacher-forced chains of K stages.

    At stage j a chain has round(r L_eff) answer positions unmasked, r ~ U[j/K, (j+1)/K), at most L_eff - 1. A
    step reveals the masked positions where the model is most confident, always with the true tokens. With a
    threshold, positions above it are revealed too and the stage follows the unmasked fraction. A stage number
    only ever grows, so a chain ends within K steps, whatever L_eff, K and the threshold.

    Ranking looks at the input alone, never at the probability of the true token: that is what keeps
    p(x0 | xt) along the chains equal to that of the data.
    """

    def __init__(self, seed: int, stages: int, threshold: float | None = None) -> None:
        self.seed = seed
        self.stages = stages
        self.threshold = threshold

    def first_stage(self, slots: Tensor) -> Tensor:
        """Return staggered stages [B], so that every stage is present in every batch from the start."""
        return slots % self.stages

    def target_count(self, samples: Samples, stage: Tensor) -> Tensor:
        """Return how many answer positions [B] int64 are to be unmasked at `stage` [B]."""
        length = samples.answer_length
        jitter = noise.uniform(self.seed, noise.STAGE_TARGET, samples.ids, stage)  # [B] float64
        fraction = (stage + jitter) / self.stages
        return torch.minimum(torch.floor(fraction * length + 0.5).to(torch.int64), length - 1)

    def begin(self, samples: Samples, stage: Tensor) -> ChainState:
        """Return chains with the count of `stage` [B] revealed at random positions."""
        order = noise.uniform(
            self.seed, noise.INITIAL_REVEAL, samples.ids[:, None], positions_like(samples.tokens)
        )
        revealed = take_highest(samples.answer, order, self.target_count(samples, stage))
        return ChainState(samples.answer & ~revealed, stage)

    def advance(self, samples: Samples, state: ChainState, confidence: Tensor) -> tuple[ChainState, Tensor]:
        """Reveal the most confident masked positions of each chain up to the next stage's count."""
        length = samples.answer_length
        stage = state.stage + 1
        unmasked = length - state.masked.sum(dim=1)
        count = self.target_count(samples, stage) - unmasked  # below 0: the chain already has more
        masked = state.masked & ~take_highest(state.masked, confidence, count)
        if self.threshold is not None:
            masked = masked & ~(confidence > self.threshold)
            unmasked = length - masked.sum(dim=1)
            stage = torch.maximum(stage, unmasked * self.stages // length)
        return ChainState(masked, stage), stage >= self.stages
