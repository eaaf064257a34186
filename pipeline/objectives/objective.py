"""The seam between the trainer and a way of masking."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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
        index: [B, L] int64, number of the position's chain; `count` where it belongs to none (a prompt).
        count: N, the chains that a row may have; some of them may be without positions.
    """

    examples: Examples
    index: Tensor
    count: int

    @cached_property
    def answer(self) -> Tensor:
        """[B, L] bool: the positions that may be masked."""
        return self.index < self.count

    @cached_property
    def length(self) -> Tensor:
        """[B, N] int64: L_eff of each chain."""
        return self.sums(self.answer)

    @cached_property
    def rank(self) -> Tensor:
        """[B, L] int64: how many positions of its chain stand before each position."""
        return self.answer.cumsum(dim=1) - 1 - self.spread(self.length.cumsum(dim=1) - self.length)

    def restricted(self, positions: Tensor) -> Chains:
        """Return the chains of `positions` [B, L] bool alone; the others are given, as a prompt is."""
        return Chains(self.examples, self.index.masked_fill(~positions, self.count), self.count)

    def sums(self, positions: Tensor) -> Tensor:
        """Return how many of `positions` [B, L] bool lie in each chain, [B, N] int64."""
        totals = self.index.new_zeros(len(self.index), self.count + 1)
        return totals.scatter_add_(1, self.index, positions.long())[:, : self.count]

    def spread(self, values: Tensor) -> Tensor:
        """Return at each position [B, L] the value of its chain, from `values` [B, N]; 0 outside."""
        outside = values.new_zeros(len(values), 1)
        return torch.cat([values, outside], dim=1).gather(1, self.index)

    def take_highest(self, candidates: Tensor, scores: Tensor, count: Tensor) -> Tensor:
        """Choose in each chain the `count` [B, N] candidates with the highest scores; see `take_highest`."""
        if self.count == 1:
            return take_highest(candidates, scores, count[:, 0])
        by_score = _falling(candidates, scores)
        chain = self.index.masked_fill(~candidates, self.count).gather(1, by_score)
        order = by_score.gather(1, torch.argsort(chain, dim=1, stable=True))  # by chain, then by score
        each = self.sums(candidates)
        return candidates & (_inverse(order) - self.spread(each.cumsum(dim=1) - each) < self.spread(count))


@dataclass
class ChainState:
    """Where the chains of B sequences stand.

    Attributes:
        masked: [B, L] bool, the positions of the next input that are to be predicted.
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
    """What the model thinks of its predictions at the masked positions of xt; it has not seen the truth.

    Attributes:
        confidence: [B, L] float32, max_v p(v | xt); -inf at other positions, as in the other scores.
        margin: [B, L] float32, the highest probability less the second; where the objective asks for it.
        entropy: [B, L] float32, in nats; where the objective asks for it.
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
    """What the chains of B sequences reveal from one step to the next; for the curves alone.

    Attributes:
        chains: [B] int64, the chains that go on.
        ranked: [B] int64, positions that they reveal because the policy ranks them highest.
        by_threshold: [B] int64, positions that they reveal besides, for a confidence above the threshold.
    """

    chains: Tensor
    ranked: Tensor
    by_threshold: Tensor


Attention = Literal["bidirectional", "blocks", "causal"]


class Layout(Protocol):
    """How a sequence is cut into chains, and what input the model gets for a set of masked positions."""

    @property
    def mask_id(self) -> int:
        """The mask token M."""

    @property
    def attention(self) -> Attention:
        """Whether a position sees all others, its own block and those before it, or those before it alone."""

    @property
    def block_size(self) -> int | None:
        """Tokens of a block; none where the attention is not by blocks."""

    def chains(self, examples: Examples) -> Chains:
        """Return the chains of the answers."""

    def batch(self, examples: Examples, masked: Tensor, weights: Tensor, rows: int, step: int) -> MaskedBatch:
        """Return the model's input.

        Args:
            examples: the clean sequences.
            masked: [B, L] bool, the positions to be predicted.
            weights: [B, L] float32, the share of each of them in the loss.
            rows: how many they are; known on the host.
            step: the optimizer step, 1 is the first.
        """

    def decoding(self, examples: Examples) -> Visibility:
        """Return which positions see which others when a sampler fills the answers, block after block."""


class Objective(Protocol):
    """Decides which positions of each sequence are masked, from one training step to the next.

    All methods are pure functions of their arguments, run on the device of their tensors and never wait for
    it, so a chain is the same whatever rank, device or run holds it. `step` is the optimizer step, 1 is the
    first; it is the same on every rank.

    Attributes:
        layout: how sequences are cut into chains and shown to the model.
        needs: which of "margin" and "entropy" `advance` reads besides the confidence.
    """

    layout: Layout
    needs: tuple[str, ...]

    def first_stage(self, slots: Tensor, step: int) -> Tensor:
        """Return the stage [B] at which the chains of slots [B] start when the objective itself does."""

    def begin(self, chains: Chains, stage: Tensor, step: int) -> ChainState:
        """Return new chains at `stage` [B, N], ready for `step`, before the model has seen them."""

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return the share of each masked position in the loss, [B, L] float32."""

    def advance(
        self, chains: Chains, state: ChainState, scores: Scores, step: int, next_step: int
    ) -> tuple[ChainState, Tensor, Reveals | None]:
        """Move every chain on after training on `state` at `step`; it will be trained next at `next_step`.

        Returns:
            The state for that step; [B] bool: sequences that have ended, whose state the caller
            replaces; and what was revealed, where this objective reveals at all.
        """

    def held_out(self) -> Objective:
        """Return the objective of the held-out loss: the same masks whatever was trained with, or when."""


def model_input(objective: Objective, chains: Chains, state: ChainState, rows: int, step: int) -> MaskedBatch:
    """Return the batch that an objective trains on at `step`; `rows` positions are masked in all."""
    weights = objective.weights(chains, state)
    batch = objective.layout.batch(chains.examples, state.masked, weights, rows, step)
    return batch._replace(scores=objective.needs)


class ObjectiveSchedule:
    """The objective of each step: one for the whole run, or several after each other."""

    def __init__(self, longest: int, *parts: tuple[int, Objective]) -> None:
        """Begin each objective at its step; the first of them begins at step 1.

        Args:
            longest: the most steps that a sequence lasts in this run.
            parts: the objectives.
        """
        self.longest = longest
        self.parts = parts

    def at(self, step: int) -> Objective:
        """Return the objective of `step`."""
        return [objective for first, objective in self.parts if first <= step][-1]


def mean_over_chains(chains: Chains, masked: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return weights [B, L] float32 whose loss is a mean over sequences, over chains and over positions.

    A position weighs factor / (masked positions of its chain x chains of its sequence with a mask x B).

    Args:
        chains: the chains.
        masked: [B, L] bool.
        factor: [B, N] float, replaces 1 / (masked positions of the chain) where given.
    """
    count = chains.sums(masked)
    each = 1.0 / count if factor is None else factor
    live = (count > 0).sum(dim=1, keepdim=True)  # [B, 1]
    return chains.spread(each.float() / (live * len(masked)))


def positions_like(tokens: Tensor) -> Tensor:
    """Return [1, L] int64 positions for tokens [B, L]."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def take_highest(candidates: Tensor, scores: Tensor, count: Tensor) -> Tensor:
    """Choose in each row the `count` candidates with the highest scores; ties go to the lower position.

    Args:
        candidates: [B, L] bool.
        scores: [B, L] float32 or float64; bf16 would tie where the model does not.
        count: [B] int64, any value; at most all candidates of the row are chosen.

    Returns:
        [B, L] bool, a subset of `candidates`.
    """
    return candidates & (_inverse(_falling(candidates, scores)) < count[:, None])


def _falling(candidates: Tensor, scores: Tensor) -> Tensor:
    """Return the order [B, L] of the scores, highest first; what is no candidate comes last."""
    return torch.argsort(scores.masked_fill(~candidates, -torch.inf), dim=1, descending=True, stable=True)


def _inverse(order: Tensor) -> Tensor:
    """Return the place [B, L] of each position in `order` [B, L]."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
