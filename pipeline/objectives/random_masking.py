"""Random masking, the baseline: every step masks a random subset of each answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.objectives import noise
from pipeline.objectives.mask_ratio import UNIFORM, MaskRatio
from pipeline.objectives.seam import (
    Chains,
    ChainState,
    Layout,
    Reveals,
    Scores,
    mean_over_chains,
    positions_like,
)


@dataclass(frozen=True)
class RandomMasking:
    """Masks a random subset of each chain; a sequence lasts one step, or two with complementary pairs.

    count = uniform: n ~ U{1..L_eff} random positions, each weighing 1/n. count = bernoulli: t ~ U(0, 1), each
    position with probability t, each weighing 1/(t L_eff) (LLaDA, arXiv 2502.09992, equation 3). Both have
    the same expectation, the usual bound on the negative log-likelihood divided by L_eff.

    An empty Bernoulli mask would waste a forward. Masks are therefore drawn given that they are not empty,
    and weigh P(not empty) = 1 - (1 - t)^L_eff times as much. An empty mask has no loss, so the expectation is
    the same, and no weight exceeds 1.

    With another distribution of the mask ratio, n = uniform is drawn from that; the loss is the bound again
    when each n weighs as much as it has become rarer (`weighted`).

    Attributes:
        seed: seed of the masks.
        layout: cuts sequences into chains.
        count: distribution of the number of masked positions.
        strata: slots of the global batch, over which t is stratified; None = independent draws.
        complementary: train on each mask and, in the next step, on its complement.
        ratios: distribution of n / L_eff, for count = uniform.
        weighted: let the loss be the bound whatever the distribution; it must cover 0 to 1.
    """

    seed: int
    layout: Layout
    count: Literal["uniform", "bernoulli"] = "uniform"
    strata: int | None = None
    complementary: bool = False
    ratios: MaskRatio = UNIFORM
    weighted: bool = False
    needs: ClassVar[tuple[str, ...]] = ()

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return zeros [B]: there are no stages."""
        return torch.zeros_like(slots)

    def ratio(self, chains: Chains, stage: Tensor) -> Tensor:
        """Return a number in [0, 1) for each chain, [B, N], that sets its mask ratio.

        Stratified, it is (u + i/S) mod 1 for slot i of S, with one u for all slots. Example s + S c is the
        c-th of slot s, so each round of S examples covers [0, 1) evenly.
        """
        ids, number = chains.examples.ids[:, None], chain_numbers(chains)
        if self.strata is None:
            return noise.uniform(self.seed, noise.MASK_RATIO, ids, number, stage)
        shared = noise.uniform(self.seed, noise.MASK_RATIO, ids // self.strata, number, stage)
        return (shared + (ids % self.strata).double() / self.strata) % 1.0

    def draw(self, chains: Chains, stage: Tensor) -> Tensor:
        """Return masks [B, L] bool for `stage` [B, N], independent between stages and never empty."""
        ratio = self.ratio(chains, stage)
        positions, stages = positions_like(chains.index), chains.spread(stage)
        order = noise.uniform(
            self.seed, noise.MASK_POSITIONS, chains.examples.ids[:, None], positions, stages
        )
        if self.count == "uniform":
            before_last = (self.ratios.quantile(ratio) * chains.length).to(torch.int64)
            return chains.take_highest(
                chains.answer, order, 1 + torch.minimum(before_last, chains.length - 1)
            )
        # The first masked position is geometric, cut off at L_eff; each behind it is masked independently.
        u = noise.uniform(
            self.seed, noise.FIRST_MASKED, chains.examples.ids[:, None], chain_numbers(chains), stage
        )
        length = chains.length.clamp(min=1)
        log_kept = torch.log(ratio)  # log (1 - t)
        first = torch.log1p(u * torch.expm1(length * log_kept)) / log_kept
        first = torch.minimum(first.to(torch.int64), length - 1)
        behind = chains.rank - chains.spread(first)  # [B, L]
        return chains.answer & ((behind == 0) | ((behind > 0) & (order >= chains.spread(ratio))))

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Return the masks of `stage` [B, N]; of complementary pairs, odd stages hold the complements.

        The complement of a full mask is empty. The full mask is repeated then, so every n is as likely as
        without pairs.
        """
        stage = stage.expand(-1, chains.count).contiguous()
        if not self.complementary:
            return ChainState(self.draw(chains, stage), stage)
        masked = self.draw(chains, stage - stage % 2)
        others = chains.answer & ~masked
        second = (stage % 2 == 1) & (chains.sums(others) > 0)  # [B, N]
        return ChainState(torch.where(chains.spread(second), others, masked), stage)

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return the weights that belong to the distribution `count`."""
        if self.count == "uniform":
            factor = self.rarity(chains, state.masked) if self.weighted else None
            return mean_over_chains(chains, state.masked, factor)
        ratio, length = self.ratio(chains, state.stage), chains.length.clamp(min=1)
        not_empty = -torch.expm1(length * torch.log(ratio))  # 1 - (1 - t)^L_eff
        return mean_over_chains(chains, state.masked, not_empty / ((1 - ratio) * length))

    def rarity(self, chains: Chains, masked: Tensor) -> Tensor:
        """Return 1 / (n L_eff P(n)) of each chain, [B, N], with n masked positions; uniform: 1/n."""
        count, length = chains.sums(masked).clamp(min=1).double(), chains.length.clamp(min=1).double()
        chance = self.ratios.below(count / length) - self.ratios.below((count - 1) / length)
        return 1.0 / (count * length * chance)

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """End every sequence, or continue with the complement of its mask."""
        ended = torch.ones_like(chains.examples.ids, dtype=torch.bool)
        if not self.complementary:
            return state, ended, None
        return self.begin(chains, state.stage + 1, next_step), ended & (state.stage[:, 0] % 2 == 1), None


def chain_numbers(chains: Chains) -> Tensor:
    """Return [N] int64, the counter of the noise that differs between the chains of a sequence."""
    return torch.arange(chains.count, device=chains.index.device)
