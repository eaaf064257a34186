"""Random masking, the baseline: each step masks a random subset of each answer."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.batch import Samples
from pipeline.objectives import noise
from pipeline.objectives.base import ChainState, positions_like, take_highest


def random_masks(seed: int, samples: Samples) -> Tensor:
    """Return [B, L] bool masks: n ~ U{1..L_eff}, then n answer positions at random.

    A mask depends on (seed, sample id) alone, so that a held-out set has the same masks for ever.
    """
    length = samples.answer_length
    count = 1 + (noise.uniform(seed, noise.MASK_COUNT, samples.ids) * length).to(torch.int64)  # [B]
    order = noise.uniform(seed, noise.MASK_POSITIONS, samples.ids[:, None], positions_like(samples.tokens))
    return take_highest(samples.answer, order, count)


class RandomMasking:
    """Masks n ~ U{1..L_eff} positions of each answer (MDLM, LLaDA); every sequence lasts one step.

    With the loss of a sequence divided by its n, this is the usual bound on the negative log-likelihood.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def first_stage(self, slots: Tensor) -> Tensor:
        """Return zeros [B]: there are no stages."""
        return torch.zeros_like(slots)

    def begin(self, samples: Samples, stage: Tensor) -> ChainState:
        """Return freshly drawn masks."""
        return ChainState(random_masks(self.seed, samples), stage)

    def advance(self, samples: Samples, state: ChainState, confidence: Tensor) -> tuple[ChainState, Tensor]:
        """Change nothing and end every sequence."""
        return state, torch.ones_like(state.stage, dtype=torch.bool)
