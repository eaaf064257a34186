"""The seam between training and a way of masking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.model.batch import HeadOutput, MaskedBatch, Visibility


@dataclass
class Chains:
    """How B sequences are cut into chains: one for a whole answer, or one for each of its blocks.

    Attributes:
        examples: the clean sequences.
        index: [B, L] int64, chain of each position; `count` for positions of no chain, such as a prompt.
        count: N, chains of a row; some may have no positions.
        answer: [B, L] bool, the positions that may be masked.
        length: [B, N] int64, L_eff of each chain.
    """

    examples: Examples
    index: Tensor
    count: int
    answer: Tensor = field(init=False)
    length: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Count the positions; not when asked, because torch.compile cannot follow a cached property."""
        self.answer = self.index < self.count
        self.length = self.sums(self.answer)

    @property
    def rank(self) -> Tensor:
        """[B, L] int64: positions of the same chain before each position."""
        return self.answer.cumsum(dim=1) - 1 - self.spread(self.length.cumsum(dim=1) - self.length)

    def restricted(self, positions: Tensor) -> Chains:
        """Return the chains of `positions` [B, L] bool alone; the others are given, as a prompt is."""
        return Chains(self.examples, self.index.masked_fill(~positions, self.count), self.count)

    def sums(self, positions: Tensor) -> Tensor:
        """Count the `positions` [B, L] bool of each chain: [B, N] int64."""
        totals = self.index.new_zeros(len(self.index), self.count + 1)
        return totals.scatter_add_(1, self.index, positions.long())[:, : self.count]

    def spread(self, values: Tensor) -> Tensor:
        """Spread the `values` [B, N] of chains over their positions, [B, L]; 0 outside of chains."""
        outside = values.new_zeros(len(values), 1)
        return torch.cat([values, outside], dim=1).gather(1, self.index)

    def take_highest(self, candidates: Tensor, scores: Tensor, count: Tensor) -> Tensor:
        """Choose the `count` [B, N] candidates of each chain with the highest scores; see `take_highest`."""
        if self.count == 1:
            return take_highest(candidates, scores, count[:, 0])
        by_score = _falling(candidates, scores)
        chain = self.index.masked_fill(~candidates, self.count).gather(1, by_score)
        order = by_score.gather(1, torch.argsort(chain, dim=1, stable=True))  # by chain, then by score
        each = self.sums(candidates)
        return candidates & (_inverse(order) - self.spread(each.cumsum(dim=1) - each) < self.spread(count))


@dataclass
class ChainState:
    """State of the chains of B sequences.

    Attributes:
        masked: [B, L] bool, masked positions of the next input.
        stage: [B, N] int64.
    """

    masked: Tensor
    stage: Tensor

    def replaced(self, where: Tensor, other: ChainState) -> ChainState:
        """Return the state with rows `where` [B] bool taken from `other`."""
        rows = where[:, None]
        return ChainState(
            torch.where(rows, other.masked, self.masked), torch.where(rows, other.stage, self.stage)
        )

    def to(self, device: torch.device) -> ChainState:
        """Return the state on `device`."""
        return ChainState(self.masked.to(device), self.stage.to(device))


@dataclass
class Scores:
    """Scores of the predictions at the masked positions of xt. None of them depends on x0.

    Attributes:
        confidence: [B, L] float32, max_v p(v | xt); -inf at unmasked positions, as in the other scores.
        margin: [B, L] float32, highest minus second probability; None unless the objective needs it.
        entropy: [B, L] float32, nats; None unless the objective needs it.
    """

    confidence: Tensor
    margin: Tensor | None = None
    entropy: Tensor | None = None

    @classmethod
    def of(cls, output: HeadOutput, rows: Tensor, masked: Tensor) -> Scores:
        """Return the scores of `output` at `rows` [R] of the flattened `masked` [B, L]."""

        def place(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return (
                values.new_full(masked.shape, -torch.inf)
                .flatten()
                .index_copy(0, rows, values)
                .view_as(masked)
            )

        confidence = place(output.confidence)
        assert confidence is not None
        return cls(confidence, place(output.margin), place(output.entropy))


class Reveals(NamedTuple):
    """Positions revealed between two steps; used for curves only.

    Attributes:
        chains: [B] int64, chains that have not ended.
        ranked: [B] int64, positions that these reveal by the ranking of the policy.
        by_threshold: [B] int64, further positions that they reveal by a confidence above the threshold.
    """

    chains: Tensor
    ranked: Tensor
    by_threshold: Tensor


Attention = Literal["bidirectional", "blocks", "causal"]


class Layout(Protocol):
    """Cuts sequences into chains, and makes the model's input for a set of masked positions."""

    @property
    def mask_id(self) -> int:
        """The mask token M."""

    @property
    def attention(self) -> Attention:
        """Which positions each position sees: all, its own block and earlier ones, or earlier positions."""

    def chains(self, examples: Examples) -> Chains:
        """Return the chains of the answers."""

    def batch(self, examples: Examples, masked: Tensor, weights: Tensor, rows: int, step: int) -> MaskedBatch:
        """Return the model's input.

        Args:
            examples: the clean sequences.
            masked: [B, L] bool, positions to predict.
            weights: [B, L] float32, weight of each masked position in the loss.
            rows: number of masked positions, known on the host.
            step: optimizer step, 1 is the first.
        """

    def decoding(self, examples: Examples) -> Visibility:
        """Return which positions see which others while a sampler fills the answers, block after block."""


class Objective(Protocol):
    """Decides which positions of each sequence are masked, from one training step to the next.

    All methods are pure functions, run on the device of their arguments and never wait for it. So a chain is
    the same on any rank, on any device and in any run. `step` is the optimizer step, 1 is the first.

    Attributes:
        layout: cuts sequences into chains and shows them to the model.
        needs: "margin" or "entropy", where `advance` reads them besides the confidence.
    """

    @property
    def layout(self) -> Layout: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return the stage [B] of the chains of slots [B] at the first step of the objective."""

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Begin chains at `stage` [B, N] for `step`; no scores exist yet."""

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return the weight of each masked position in the loss, [B, L] float32."""

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Advance every chain after training on `state` at `step`, for its next training at `next_step`.

        Returns:
            The next state; [B] bool, sequences that have ended, which the caller replaces; and what was
            revealed, None for objectives that do not reveal.
        """


def model_input(objective: Objective, chains: Chains, state: ChainState, rows: int, step: int) -> MaskedBatch:
    """Return the batch of an objective at `step`; `rows` is the number of masked positions."""
    weights = objective.weights(chains, state)
    batch = objective.layout.batch(chains.examples, state.masked, weights, rows, step)
    return batch._replace(scores=objective.needs)


class ObjectiveSchedule:
    """The objective of each step: one for the whole run, or one after another."""

    def __init__(self, longest: int, *parts: tuple[int, Objective]) -> None:
        """Make the schedule.

        Args:
            longest: most steps that an example is trained on before its slot moves on.
            parts: (first step, objective), the first of them from step 1.
        """
        self.longest = longest
        self.parts = parts

    def at(self, step: int) -> Objective:
        """Return the objective of `step`."""
        return [objective for first, objective in self.parts if first <= step][-1]


def mean_over_chains(chains: Chains, masked: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return weights [B, L] float32 that make the loss a mean over sequences, chains and positions.

    The weight of a position is factor / (chains of its sequence that have a mask x B).

    Args:
        chains: the chains of B sequences.
        masked: [B, L] bool.
        factor: [B, N] float; by default 1 / (masked positions of the chain).
    """
    count = chains.sums(masked)
    each = 1.0 / count if factor is None else factor
    live = (count > 0).sum(dim=1, keepdim=True)  # [B, 1]
    return chains.spread(each.float() / (live * len(masked)))


def positions_like(tokens: Tensor) -> Tensor:
    """Return [1, L] int64 positions for tokens [B, L]."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def take_highest(candidates: Tensor, scores: Tensor, count: Tensor) -> Tensor:
    """Choose the `count` candidates of each row with the highest scores; ties go to the lower position.

    Args:
        candidates: [B, L] bool.
        scores: [B, L] float32 or float64; bf16 would tie scores that differ.
        count: [B] int64, any value: below 0 means none, too high means all.

    Returns:
        [B, L] bool, a subset of `candidates`.
    """
    return candidates & (_inverse(_falling(candidates, scores)) < count[:, None])


def _falling(candidates: Tensor, scores: Tensor) -> Tensor:
    """Return the order [B, L] of the scores, highest first; positions that are no candidates come last."""
    return torch.argsort(scores.masked_fill(~candidates, -torch.inf), dim=1, descending=True, stable=True)


def _inverse(order: Tensor) -> Tensor:
    """Return the inverse [B, L] of the permutations `order` [B, L]."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
