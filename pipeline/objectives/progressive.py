"""PUMA, progressive unmasking (arXiv 2602.10314): chains that follow the model's own order of unmasking."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objectives import noise
from pipeline.objectives.objective import (
    Chains,
    ChainState,
    Layout,
    Objective,
    Reveals,
    Scores,
    mean_over_chains,
)
from pipeline.objectives.policies import Policy
from pipeline.objectives.random_masking import chain_numbers, held_out_masking
from pipeline.objectives.stages import StageSchedule


class ProgressiveUnmasking:
    """Teacher-forced chains of K stages.

    At stage j a chain has round(r L_eff) answer positions unmasked, r ~ U[j/K, (j+1)/K), at most L_eff - 1. A
    step reveals the masked positions that the policy ranks highest, always with the true tokens. With a
    threshold, positions of a higher confidence are revealed too and the stage follows the unmasked fraction.
    A stage number only ever grows, so a chain ends within K steps, whatever L_eff, K and the threshold. A
    sequence ends when all its chains have; one that ends earlier is left without a mask.
    """

    def __init__(
        self, seed: int, layout: Layout, stages: StageSchedule, policy: Policy, threshold: float | None = None
    ) -> None:
        """Make the objective.

        Args:
            seed: seed of the chains' noise.
            layout: how sequences are cut into chains.
            stages: K.
            policy: what is revealed first.
            threshold: confidence above which everything is revealed; none = standard mode.
        """
        self.seed = seed
        self.layout = layout
        self.stages = stages
        self.policy = policy
        self.threshold = threshold
        self.needs = policy.needs

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return staggered stages [B], so that every stage is present in every batch from the start."""
        return slots % self.stages(step)

    def target_count(self, chains: Chains, stage: Tensor, step: int) -> Tensor:
        """Return how many positions of each chain [B, N] are to be unmasked at `stage` [B, N] of `step`."""
        ids, number = chains.examples.ids[:, None], chain_numbers(chains)
        jitter = noise.uniform(self.seed, noise.STAGE_TARGET, ids, number, stage)
        fraction = (stage + jitter) / self.stages(step)
        length = chains.length
        return torch.minimum(torch.floor(fraction * length + 0.5).to(torch.int64), length - 1)

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Return chains with the count of `stage` [B, N] revealed, by the policy's order or at random."""
        stage = stage.expand(-1, chains.count).contiguous()
        count = self.target_count(chains, stage, step)
        revealed = chains.take_highest(chains.answer, self.policy.initial(self.seed, chains.examples), count)
        return ChainState(chains.answer & ~revealed, stage)

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return 1 / (masked positions of the chain), shared out equally over chains and sequences."""
        return mean_over_chains(chains, state.masked)

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Reveal the highest ranked masked positions of each chain up to the next stage's count."""
        length, final = chains.length, self.stages(next_step)
        stage = self.stages.following(state.stage, step, next_step)
        unmasked = length - chains.sums(state.masked)
        count = self.target_count(chains, stage, next_step) - unmasked  # below 0: it has more already
        ranking = self.policy.ranking(self.seed, chains.examples, scores)
        masked = ranked = state.masked & ~chains.take_highest(state.masked, ranking, count)
        if self.threshold is not None:
            masked = masked & ~(scores.confidence > self.threshold)
            unmasked = length - chains.sums(masked)
            stage = torch.maximum(stage, unmasked * final // length.clamp(min=1))
        ended = (stage >= final) | (length == 0)  # [B, N]
        going_on = ~chains.spread(ended)  # [B, L]
        reveals = Reveals(
            (~ended).sum(dim=1),
            (state.masked & ~ranked & going_on).sum(dim=1),
            (ranked & ~masked & going_on).sum(dim=1),
        )
        return ChainState(masked & going_on, stage), ended.all(dim=1), reveals

    def held_out(self) -> Objective:
        """Return random masking with the masks of every held-out loss."""
        return held_out_masking(self.layout)
