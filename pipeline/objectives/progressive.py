"""PUMA, progressive unmasking (arXiv 2602.10314): chains that follow the model's own order of unmasking."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objectives import noise
from pipeline.objectives.policies import Policy
from pipeline.objectives.random_masking import chain_numbers
from pipeline.objectives.seam import Chains, ChainState, Layout, Reveals, Scores, mean_over_chains
from pipeline.objectives.stages import StageSchedule


class ProgressiveUnmasking:
    """Teacher-forced chains of K stages (arXiv 2602.10314).

    At stage j, round(r L_eff) answer positions of a chain are unmasked, r ~ U[j/K, (j+1)/K), at most L_eff -
    1. A step reveals the masked positions that the policy ranks highest, always with the true tokens. With a
    threshold it also reveals every position of a higher confidence; where there is one, the stage follows
    the unmasked fraction. Stages only grow, so a chain ends within K steps, whatever L_eff, K and the
    threshold. A sequence ends when its last chain does; chains that end earlier have no masks from then on.
    """

    def __init__(
        self, seed: int, layout: Layout, stages: StageSchedule, policy: Policy, threshold: float | None = None
    ) -> None:
        """Make the objective.

        Args:
            seed: seed of the noise.
            layout: cuts sequences into chains.
            stages: K by step.
            policy: what is revealed first.
            threshold: confidence above which every position is revealed; None = standard mode.
        """
        self.seed = seed
        self.layout = layout
        self.stages = stages
        self.policy = policy
        self.threshold = threshold
        self.needs = policy.needs

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return staggered stages [B], so that every batch holds all stages from the start."""
        return slots % self.stages(step)

    def target_count(self, chains: Chains, stage: Tensor, step: int) -> Tensor:
        """Return the unmasked positions of each chain, [B, N] int64, at `stage` [B, N] of `step`."""
        ids, number = chains.examples.ids[:, None], chain_numbers(chains)
        jitter = noise.uniform(self.seed, noise.STAGE_TARGET, ids, number, stage)
        fraction = (stage + jitter) / self.stages(step)
        length = chains.length
        return torch.minimum(torch.floor(fraction * length + 0.5).to(torch.int64), length - 1)

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Begin chains with the positions of `stage` [B, N] revealed, in the initial order of the policy."""
        stage = stage.expand(-1, chains.count).contiguous()
        count = self.target_count(chains, stage, step)
        revealed = chains.take_highest(chains.answer, self.policy.initial(self.seed, chains.examples), count)
        return ChainState(chains.answer & ~revealed, stage)

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return 1 / (masked positions of the chain), averaged over chains and sequences."""
        return mean_over_chains(chains, state.masked)

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Reveal the highest ranked masked positions of each chain, up to the count of its next stage."""
        length, final = chains.length, self.stages(next_step)
        stage = self.stages.following(state.stage, step, next_step)
        unmasked = length - chains.sums(state.masked)
        count = self.target_count(chains, stage, next_step) - unmasked  # below 0: it has more already
        ranking = self.policy.ranking(self.seed, chains.examples, scores)
        masked = ranked = state.masked & ~chains.take_highest(state.masked, ranking, count)
        if self.threshold is not None:
            masked = masked & ~(scores.confidence > self.threshold)
            left = chains.sums(masked)  # [B, N]
            reached = torch.maximum(stage, (length - left) * final // length.clamp(min=1))
            # A count that is rounded up may lie in the next stage already, and would skip it by itself.
            stage = torch.where(left < chains.sums(ranked), reached, stage)
        ended = (stage >= final) | (length == 0)  # [B, N]
        going_on = ~chains.spread(ended)  # [B, L]
        reveals = Reveals(
            (~ended).sum(dim=1),
            (state.masked & ~ranked & going_on).sum(dim=1),
            (ranked & ~masked & going_on).sum(dim=1),
        )
        return ChainState(masked & going_on, stage), ended.all(dim=1), reveals
