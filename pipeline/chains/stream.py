"""Streams of examples, one per slot: each example once an epoch, at any world size and accumulation.

Position p of the endless stream is example p mod N of epoch p div N, and each epoch has its own permutation.
Slot s of S reads the positions s, s + S, s + 2S, ... Its cursor, the number of chains that it has begun, is
the whole state.

Each phase of the data is a stream of its own. From its first step on, every example that a slot begins comes
from it, the first one at position s; the chain that the slot was in is trained to its end. Where the batch
grows (`pipeline.chains.deal`), the positions that no slot has begun are dealt out anew, in order, to the old
and the new slots. A cursor holds the number of the deal in its high bits, so that it stays the whole state of
a slot. The id of an example is its position, and its phase in the high bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.base.errors import Failure
from pipeline.chains.deal import Deal
from pipeline.data.examples import Array, ExampleDataset, Examples, stack_examples

_ROUNDS = 4
_EPOCHS = 256  # permutations kept; far fewer epochs are in use at once
_COUNT_BITS = 32  # of a cursor: chains begun in a deal; the number of the deal above them


class Permutation:
    """A keyed pseudo-random permutation of 0..size-1 in constant memory.

    A Feistel network over the smallest even number of bits that holds `size`, applied until the value is
    below `size` (cycle walking; Black and Rogaway 2002, Ciphers with arbitrary finite domains): at most 4
    times on average.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)
        self.keys = [int(k) for k in np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)]

    def __call__(self, index: int) -> int:
        """Return the image of `index`, 0 <= index < size."""
        mask = (1 << self.half) - 1
        while True:
            left, right = index >> self.half, index & mask
            for key in self.keys:
                mixed = (right + key) * 0xD1342543DE82EF95 & 0xFFFFFFFFFFFFFFFF
                mixed = (mixed ^ (mixed >> 32)) * 0xAAAAAAAAAAAAAAAB & 0xFFFFFFFFFFFFFFFF
                left, right = right, left ^ (mixed >> 32 & mask)
            index = left << self.half | right
            if index < self.size:
                return index


class StreamPhase(NamedTuple):
    """A phase of the stream.

    Attributes:
        first_step: from which on slots begin its examples.
        dataset: its examples of an epoch.
        size: number of them.
        first_example: number of the first one; the examples of all phases are numbered one after the other.
    """

    first_step: int
    dataset: ExampleDataset
    size: int
    first_example: int


class SlotStream:
    """Reads the examples of any slot by cursor, and prefetches the next one of each."""

    def __init__(
        self,
        dataset: ExampleDataset,
        slots: int,
        seed: int,
        workers: int,
        later: Mapping[int, ExampleDataset] | None = None,
        larger: Mapping[int, int] | None = None,
    ) -> None:
        """Make the stream, before its first step.

        Args:
            dataset: examples of an epoch of the first phase.
            slots: S, slots over all ranks.
            seed: seed of the permutations.
            workers: prefetching threads; with 0, `read` itself reads. It does not change the examples.
            later: examples of an epoch of each later phase, by the first step of the phase, in order.
            larger: a larger S by the step from which on it holds, in order.
        """
        self.slots = {1: slots, **(larger or {})}
        self.phases: list[StreamPhase] = []
        examples = 0
        for first_step, each in {1: dataset, **(later or {})}.items():
            self.phases.append(StreamPhase(first_step, each, len(each), examples))
            examples += len(each)

        def permutation(phase: int, epoch: int) -> Permutation:
            return Permutation(self.phases[phase].size, seed, epoch, phase)

        self._permutation = lru_cache(_EPOCHS)(permutation)
        self._ahead: dict[int, tuple[int, Future[dict[str, Array]]]] = {}  # slot: (id, example)
        self._waited = 0.0
        self._excluded: frozenset[int] = frozenset()
        self._pool = ThreadPoolExecutor(workers, "samples") if workers else None
        self.begin(1, {})

    def begin(self, step: int, dealt: Mapping[int, Sequence[int]]) -> None:
        """Be as before `step`.

        Args:
            step: the next one.
            dealt: what `deal` was given at each of the steps before it.
        """
        self.dealt: dict[int, list[int]] = {}
        self.deals: list[Deal] = []
        for first_step in sorted({phase.first_step for phase in self.phases} | self.slots.keys()):
            slots = max(slots for first, slots in self.slots.items() if first <= first_step)
            phase = self.phase_at(first_step)
            # The batch grew before a branch, at whose first step nothing has been begun, or it will grow.
            known = first_step < step or first_step == self.phases[phase].first_step
            self.deals.append(Deal(first_step, phase, slots, known))
            if first_step in dealt:
                self.deal(first_step, dealt[first_step])

    def deal(self, step: int, begun: Sequence[int]) -> None:
        """Deal the examples that no slot has begun to the larger number of slots that begins at `step`.

        Args:
            step: the first one of the larger batch.
            begun: for each slot before, the examples that it has begun since the deal before.
        """
        number = next(n for n, deal in enumerate(self.deals) if deal.first_step == step)
        before, deal = self.deals[number - 1], self.deals[number]
        if before.phase == deal.phase:  # a phase that begins here has all its examples to deal
            self.dealt[step] = list(begun)
            self.deals[number] = before.dealt_anew(step, deal.slots, begun, self.phases[deal.phase].size)

    def phase_at(self, step: int) -> int:
        """Return the phase whose examples slots begin at `step`, 0 for the first."""
        return sum(phase.first_step <= step for phase in self.phases) - 1

    def deal_at(self, step: int) -> int:
        """Return the number of the deal from which slots begin examples at `step`, as far as it is known."""
        return max(n for n, deal in enumerate(self.deals) if deal.known and deal.first_step <= step)

    @staticmethod
    def first_cursor(deal: int) -> int:
        """Return the cursor of a slot at its first example of a deal."""
        return deal << _COUNT_BITS

    def following(self, cursor: int, deal: int) -> int:
        """Return the cursor after `cursor` of a slot that begins its next example in `deal`."""
        return cursor + 1 if cursor >> _COUNT_BITS == deal else self.first_cursor(deal)

    @staticmethod
    def counts(cursors: np.ndarray, deal: int) -> np.ndarray:
        """Return how many examples of `deal` precede each of the `cursors`."""
        return np.where(cursors >> _COUNT_BITS == deal, cursors & ((1 << _COUNT_BITS) - 1), 0)

    def begun(self, slots: np.ndarray, cursors: np.ndarray, step: int) -> tuple[int, int]:
        """Return how many examples of the phase of `step` precede `cursors` of `slots`.

        And those of its first epoch. What was begun before the examples were dealt anew is counted at slot 0.
        """
        number = self.deal_at(step)
        deal, counts = self.deals[number], self.counts(cursors, number)
        first_epoch = np.minimum(counts, deal.counts_below(self.phases[deal.phase].size, slots))
        before = deal.begun if 0 in slots else (0, 0)
        return before[0] + int(counts.sum()), before[1] + int(first_epoch.sum())

    def _id(self, slot: int, cursor: int) -> int:
        number, count = divmod(cursor, 1 << _COUNT_BITS)
        deal = self.deals[number]
        return deal.position(slot, count) + (deal.phase * self.slots[1] << _COUNT_BITS)

    def _place(self, id: int) -> tuple[StreamPhase, int, int]:
        """Return phase and epoch of an id, and the index of its example within the phase."""
        phase, position = divmod(id, self.slots[1] << _COUNT_BITS)
        epoch, offset = divmod(position, self.phases[phase].size)
        return self.phases[phase], epoch, self._permutation(phase, epoch)(offset)

    def epoch(self, id: int) -> int:
        """Return the epoch, within its phase, of the example with this id."""
        return self._place(id)[1]

    def index(self, id: int) -> int:
        """Return the number of the example with this id, which it has in every epoch."""
        phase, _, index = self._place(id)
        return phase.first_example + index

    def exclude(self, examples: Iterable[int]) -> None:
        """Leave these examples out of every epoch; slots skip to the next example of their stream.

        Raises:
            Failure: when that is half of a phase's examples or more: then the examples are not the cause.
        """
        self._excluded = frozenset(examples)
        for phase in self.phases:
            last = phase.first_example + phase.size
            count = sum(phase.first_example <= example < last for example in self._excluded)
            if 2 * count >= phase.size:
                raise Failure(
                    f"{count} of {phase.size} training examples would be left out as harmful: look for "
                    "another cause (skipped.jsonl of the run, the learning rate, a defective GPU)."
                )

    def admitted(self, slots: Sequence[int], cursors: Sequence[int]) -> list[int]:
        """Return for each slot the first cursor, at or after its own, whose example is not left out."""
        admitted = []
        for slot, cursor in zip(slots, cursors, strict=True):
            while self._excluded and self.index(self._id(slot, cursor)) in self._excluded:
                cursor += 1
            admitted.append(cursor)
        return admitted

    def _read(self, id: int) -> dict[str, Array]:
        phase, _, index = self._place(id)
        return phase.dataset[index]

    def read(self, slots: Sequence[int], cursors: Sequence[int]) -> Examples:
        """Return the examples at `cursors` of `slots`, on the CPU, and prefetch those that follow."""
        began = time.perf_counter()
        ids = [self._id(slot, cursor) for slot, cursor in zip(slots, cursors, strict=True)]
        rows = []
        for slot, cursor, id in zip(slots, cursors, ids, strict=True):
            expected, ahead = self._ahead.pop(slot, (None, None))
            if ahead is None or expected != id:  # it has been left out since, or another deal has begun
                rows.append(self._read(id))
            else:
                rows.append(ahead.result())
            if self._pool is not None:
                following = self._id(slot, cursor + 1)
                self._ahead[slot] = following, self._pool.submit(self._read, following)
        examples = stack_examples(rows, ids)
        self._waited += time.perf_counter() - began
        return examples

    def take_waited(self) -> float:
        """Return the seconds spent in `read` since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stop the reading threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
