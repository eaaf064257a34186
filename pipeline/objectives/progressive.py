"""PUMA, progressive unmasking (arXiv 2602.10314): chains that follow the model's own order of unmasking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.objectives import noise
from pipeline.objectives.mask_ratio import UNIFORM, MaskRatio
from pipeline.objectives.policies import Policy
from pipeline.objectives.random_masking import chain_numbers
from pipeline.objectives.seam import Chains, ChainState, Layout, Reveals, Scores, mean_over_chains
from pipeline.objectives.stages import StageSchedule


@dataclass(frozen=True)
class ProgressiveUnmasking:
    """Teacher-forced chains of K stages (arXiv 2602.10314).

    At stage j, round(r L_eff) answer positions of a chain are unmasked, r ~ U[j/K, (j+1)/K), at most L_eff -
    1. A step reveals the masked positions that the policy ranks highest, always with the true tokens. With a
    threshold it also reveals every position of a higher confidence; where there is one, the stage follows
    the unmasked fraction. Stages only grow, so a chain ends within K steps, whatever L_eff, K and the
    threshold. A sequence ends when its last chain does; chains that end earlier have no masks from then on.

    Attributes:
        seed: seed of the noise.
        layout: cuts sequences into chains.
        stages: K by step.
        policy: what is revealed first.
        threshold: confidence above which every position is revealed; None = standard mode.
        ratios: distribution of the mask ratio over the stages; the paper's is uniform.
        skipped: most stages that a chain skips at a step, each number equally likely.
        pool: share of a chain's masked positions, the highest ranked, of which random ones are revealed; 0 =
            the highest ranked are.
    """

    seed: int
    layout: Layout
    stages: StageSchedule
    policy: Policy
    threshold: float | None = None
    ratios: MaskRatio = UNIFORM
    skipped: int = 0
    pool: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:
        """Those of the policy."""
        return self.policy.needs

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return staggered stages [B], so that every batch holds all stages from the start."""
        return slots % self.stages(step)

    def target_count(self, chains: Chains, stage: Tensor, step: int) -> Tensor:
        """Return the unmasked positions of each chain, [B, N] int64, at `stage` [B, N] of `step`."""
        ids, number = chains.examples.ids[:, None], chain_numbers(chains)
        jitter = noise.uniform(self.seed, noise.STAGE_TARGET, ids, number, stage)
        fraction = self.ratios.revealed((stage + jitter) / self.stages(step))
        length = chains.length
        return torch.minimum(torch.floor(fraction * length + 0.5).to(torch.int64), length - 1)

    def following(self, chains: Chains, stage: Tensor, step: int, next_step: int) -> Tensor:
        """Return the stage [B, N] at `next_step` after `stage` [B, N] at `step`, some of them skipped."""
        following = self.stages.following(stage, step, next_step)
        if self.skipped == 0:
            return following
        ids, number = chains.examples.ids[:, None], chain_numbers(chains)
        jump = noise.uniform(self.seed, noise.SKIPPED_STAGES, ids, number, stage) * (self.skipped + 1)
        return following + jump.to(torch.int64)

    def chosen(self, chains: Chains, masked: Tensor, scores: Scores, count: Tensor) -> Tensor:
        """Return the `count` [B, N] positions of `masked` [B, L] that are revealed next, [B, L] bool."""
        ranking = self.policy.ranking(self.seed, chains.examples, scores)
        if self.pool == 0.0:
            return chains.take_highest(masked, ranking, count)
        size = torch.ceil(self.pool * chains.sums(masked).double()).to(torch.int64)
        candidates = chains.take_highest(masked, ranking, torch.maximum(size, count))
        order = self.policy.initial(self.seed, chains.examples)
        return chains.take_highest(candidates, order, count)

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Begin chains with the positions of `stage` [B, N] revealed, in the initial order of the policy."""
        stage = stage.expand(-1, chains.count).contiguous()
        count = self.target_count(chains, stage, step)
        revealed = chains.take_highest(chains.answer, self.policy.initial(self.seed, chains.examples), count)
        return ChainState(chains.answer & ~revealed, stage)

    def stage_of(self, masked: Tensor, length: Tensor, stages: int) -> Tensor:
        """Return the stage [B, N] of K = `stages` with `masked` of `length` [B, N] positions masked."""
        if self.ratios.is_uniform:  # in whole numbers, which do not round
            return (length - masked) * stages // length.clamp(min=1)
        done = 1.0 - self.ratios.below(masked.double() / length.clamp(min=1))
        return (done * stages + 1e-9).to(torch.int64)  # on any device, also at the border of a stage

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return 1 / (masked positions of the chain), averaged over chains and sequences."""
        return mean_over_chains(chains, state.masked)

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Reveal the highest ranked masked positions of each chain, up to the count of its next stage."""
        length, final = chains.length, self.stages(next_step)
        stage = self.following(chains, state.stage, step, next_step)
        unmasked = length - chains.sums(state.masked)
        count = self.target_count(chains, stage, next_step) - unmasked  # below 0: it has more already
        masked = ranked = state.masked & ~self.chosen(chains, state.masked, scores, count)
        if self.threshold is not None:
            masked = masked & ~(scores.confidence > self.threshold)
            left = chains.sums(masked)  # [B, N]
            reached = torch.maximum(stage, self.stage_of(left, length, final))
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
