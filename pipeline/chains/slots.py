"""Slots hold the chains of a micro-batch: examples go in, training batches come out.

A slot always holds a chain. The next example of each slot is prefetched to the device, so replacing a
finished chain is a `torch.where`, without a host sync. The flags of finished slots travel to the host during
the backward pass; the next step reads them.

There are as many slots as sequences in a global batch or, with ``objective.turns``, a multiple of that; where
the batch grows, more of them (`pipeline.chains.groups`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.base.traced import traced
from pipeline.chains.statistics import ChainStatistics, Walk
from pipeline.chains.stream import SlotStream
from pipeline.data.examples import Examples
from pipeline.model.batch import HeadOutput, MaskedBatch
from pipeline.objectives.seam import (
    Chains,
    ChainState,
    Objective,
    ObjectiveSchedule,
    Scores,
    model_input,
)


class Slots(NamedTuple):
    """What moves of B slots in a step, all on the device.

    Attributes:
        chains: the clean sequences of the current chains.
        state: their masks and stages.
        age: [B] int64, steps that the current examples have been trained on.
        following: the next example of each slot.
        numbers: [B] int64, the numbers of the slots.
    """

    chains: Chains
    state: ChainState
    age: Tensor
    following: Examples
    numbers: Tensor


def moved(
    now: Objective,
    then: Objective,
    statistics: ChainStatistics,
    slots: Slots,
    rows: Tensor,
    weights: Tensor,
    output: HeadOutput,
    step: int,
    next_step: int,
) -> tuple[Chains, ChainState, Tensor, Tensor, Tensor]:
    """Advance the chains of all slots; a slot whose chain has ended begins its next example.

    Args:
        now: objective of the step.
        then: objective of the next step of these slots.
        statistics: of the group; nothing is added here.
        slots: before the step.
        rows: [R] int64, the masked positions as indices into the flattened [B * L].
        weights: [R] float32, their weights in the loss.
        output: scores of `rows`.
        step: the optimizer step, 1 is the first.
        next_step: the one that trains these slots next.

    Returns:
        Chains, state and age after the step; [B] bool, slots with a new example; and the sums of the step.
    """
    scores = Scores.of(output, rows, slots.state.masked)
    state, ended, reveals = now.advance(slots.chains, slots.state, scores, step, next_step)
    begin_at = torch.zeros_like(slots.numbers)
    if then is not now:  # a change of objective ends every chain
        ended, begin_at = torch.ones_like(ended), then.first_stage(slots.numbers, next_step)
    fresh = then.begin(then.layout.chains(slots.following), begin_at[:, None], next_step)
    walk = Walk(slots.chains, slots.state, slots.age, ended, reveals)
    sums = statistics.of_step(walk, rows, weights, output)
    age = torch.where(ended, 0, slots.age + 1)
    state = fresh if then is not now else state.replaced(ended, fresh)
    chains = then.layout.chains(slots.chains.examples.replaced(ended, slots.following))
    return chains, state, age, ended, sums


@functools.cache
def _compiled_move() -> Callable[..., tuple[Chains, ChainState, Tensor, Tensor, Tensor]]:
    """Compile `moved` on first use, once for all groups: a few kernels instead of about 200 launches."""
    return torch.compile(moved)


class SlotGroup:
    """The chains of one micro-batch on one rank."""

    def __init__(
        self,
        slots: Sequence[int],
        stream: SlotStream,
        objectives: ObjectiveSchedule,
        device: torch.device,
        first_step: int = 1,
        interval: int = 1,
        compiled: bool = False,
        sources: Sequence[str] = (),
    ) -> None:
        """Begin the first chains of each slot, at staggered stages.

        Args:
            slots: numbers of the B slots.
            stream: source of their examples.
            objectives: objective of each step.
            device: device of the chains.
            first_step: first optimizer step that trains these slots.
            interval: steps between two trainings of these slots, ``objective.turns``.
            compiled: advance the chains by a compiled program (``engine.compile_functions``).
            sources: names of the datasets, for metrics (`DataConfig.sources`).
        """
        self.slots = np.asarray(slots, dtype=np.int64)
        self.stream = stream
        self.numbers = torch.from_numpy(self.slots).to(device)
        self.objectives = objectives
        self.device = device
        self.first_step, self.interval, self.compiled = first_step, interval, compiled
        self.statistics = ChainStatistics(objectives.longest, device, sources)
        self.trained = np.zeros_like(self.slots)  # examples that each slot has been trained on
        self.age = torch.zeros_like(self.numbers)  # steps that the current examples have been trained on
        deal = stream.deal_at(first_step)
        self._begin(np.full(len(slots), stream.first_cursor(deal), dtype=np.int64), first_step)
        objective = objectives.at(first_step)
        first = objective.first_stage(self.numbers, first_step)
        state = objective.begin(self.chains, first[:, None], first_step)
        self._enter(state, torch.zeros_like(first, dtype=torch.bool))

    @property
    def examples(self) -> Examples:
        """The clean sequences of the current chains."""
        return self.chains.examples

    def _begin(self, cursors: np.ndarray, step: int) -> None:
        """Read the examples at `cursors` [B], or the next ones not left out; prefetch the following ones.

        `step` trains them next.
        """
        rows = range(len(self.slots))
        self.next_step = step
        self.deal = self.stream.deal_at(step + self.interval)  # of the following examples
        self.cursors = self._admitted(rows, cursors)
        self.next_cursors = self._after(rows)
        self.chains = self.objectives.at(step).layout.chains(self._read(rows, self.cursors))
        self.following = self._read(rows, self.next_cursors)

    def _after(self, rows: Sequence[int]) -> np.ndarray:
        """Return the cursors of the examples that follow the current ones of `rows`."""
        following = [self.stream.following(cursor, self.deal) for cursor in self.cursors[rows].tolist()]
        return self._admitted(rows, np.asarray(following))

    def _admitted(self, rows: Sequence[int], cursors: np.ndarray) -> np.ndarray:
        slots = self.slots[list(rows)].tolist()
        return np.asarray(self.stream.admitted(slots, cursors.tolist()), dtype=np.int64)

    def _read(self, rows: Sequence[int], cursors: np.ndarray) -> Examples:
        return self.stream.read(self.slots[list(rows)].tolist(), cursors.tolist()).to(self.device)

    def _enter(self, state: ChainState, ended: Tensor) -> None:
        """Make `state` the current one, and start the copy of what the host needs to know of it."""
        self.state = state
        report = torch.cat([ended, state.masked.sum()[None]])  # [B + 1] int64
        on_gpu = self.device.type == "cuda"
        self._report = torch.empty(report.shape, dtype=report.dtype, pin_memory=on_gpu)
        self._report.copy_(report, non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def _settle(self) -> int:
        """Prefetch for the slots whose chain has ended; return the number of masked positions.

        Once, for all slots: when those that end at the next step begin their examples of another deal.
        """
        if self._arrived is not None:
            self._arrived.synchronize()  # recorded before the last backward pass: already done
        *ended, masked = self._report.tolist()
        rows = [row for row, flag in enumerate(ended) if flag]
        self.cursors[rows] = self.next_cursors[rows]
        deal = self.stream.deal_at(self.next_step + self.interval)
        if deal != self.deal:
            rows, self.deal = list(range(len(ended))), deal
        if rows:
            self.next_cursors[rows] = self._after(rows)
            fresh = self._read(rows, self.next_cursors[rows])
            where = torch.tensor(rows, pin_memory=self.device.type == "cuda")
            where = where.to(self.device, non_blocking=True)  # a copy from pageable memory would wait
            self.following.mapped(lambda old, new: old.index_copy_(0, where, new), fresh)
            self._report[:-1] = 0
        return int(masked)

    @traced("inputs")
    def inputs(self, step: int) -> MaskedBatch:
        """Return the batch of the current chains for optimizer step `step` (1 is the first)."""
        rows = self._settle()
        self.trained = self.cursors + 1
        return model_input(self.objectives.at(step), self.chains, self.state, rows, step)

    @traced("chains")
    def advance(self, batch: MaskedBatch, output: HeadOutput, step: int) -> None:
        """Advance the chains by the scores of the forward that gave the loss: no second forward."""
        next_step = step + self.interval
        now, then = self.objectives.at(step), self.objectives.at(next_step)
        move = _compiled_move() if self.compiled else moved
        slots = Slots(self.chains, self.state, self.age, self.following, self.numbers)
        scored = output._replace(loss=output.loss.detach())
        chains, state, self.age, ended, sums = move(
            now, then, self.statistics, slots, batch.rows, batch.weights, scored, step, next_step
        )
        self.statistics.add(sums)
        self.trained_ids = self.examples.ids
        self.chains, self.next_step = chains, next_step
        self._enter(state, ended)

    def begun(self, step: int) -> tuple[int, int]:
        """Return how many examples of the phase of `step` were trained on, and those of its first epoch."""
        return self.stream.begun(self.slots, self.trained, step)

    def begun_of(self, deal: int) -> np.ndarray:
        """Return how many examples of a deal each slot has begun, [B] int64, the current one included."""
        self._settle()
        return self.stream.counts(self.cursors + 1, deal)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the state, a slot a row; a resumed run reads the examples again by their cursors."""
        self._settle()
        return {
            "slots": self.slots,
            "cursors": self.cursors.copy(),
            "masked": np.packbits(self.state.masked.cpu().numpy(), axis=1),
            "stage": self.state.stage.cpu().numpy(),
            "age": self.age.cpu().numpy(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray], step: int) -> None:
        """Restore what `state_dict` returned for the same slots, to be trained next at `step` or later.

        Chains whose examples have been left out since begin anew on the next example.
        """
        if not np.array_equal(state["slots"], self.slots):
            raise ValueError("the state belongs to other slots")
        next_step = step + (self.first_step - step) % self.interval
        self._begin(state["cursors"], next_step)
        length = self.examples.tokens.shape[1]
        masked = np.unpackbits(state["masked"], axis=1, count=length).astype(bool)
        chains = ChainState(
            torch.from_numpy(masked).to(self.device), torch.from_numpy(state["stage"]).to(self.device)
        )
        fresh = self.objectives.at(next_step).begin(self.chains, torch.zeros_like(chains.stage), next_step)
        left_out = torch.from_numpy(self.cursors != state["cursors"]).to(self.device)
        chains = chains.replaced(left_out, fresh)
        age = state.get("age", np.zeros_like(self.slots))  # older checkpoints have none
        self.age = torch.where(left_out, 0, torch.from_numpy(age).to(self.device))
        self.trained = state["cursors"] + (age > 0)
        self.statistics.take()  # drops those of steps that are trained again
        self._enter(chains, torch.zeros_like(self.numbers, dtype=torch.bool))
