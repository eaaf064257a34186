"""Streams of examples, one per slot: each example once an epoch, at any world size and accumulation.

Position p of the endless stream is example p mod N of epoch p div N, and each epoch has its own permutation.
Slot s of S reads the positions s, s + S, s + 2S, ... Its cursor, the number of chains that it has begun, is
the whole state.

Each phase of the data is a stream of its own. From its first step on, every example that a slot begins comes
from it, the first one at position s; the chain that the slot was in is trained to its end. A cursor holds the
phase in its high bits, so that it stays the whole state. The id of an example is s + S x cursor: in the first
phase, the position.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.base.errors import Failure
from pipeline.data.examples import Array, ExampleDataset, Examples, stack_examples

_ROUNDS = 4
_EPOCHS = 256  # permutations kept; far fewer epochs are in use at once
_COUNT_BITS = 32  # of a cursor: chains begun in a phase; the phase above them


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
    ) -> None:
        """Make the stream.

        Args:
            dataset: examples of an epoch of the first phase.
            slots: S, slots over all ranks.
            seed: seed of the permutations.
            workers: prefetching threads; with 0, `read` itself reads. It does not change the examples.
            later: examples of an epoch of each later phase, by the first step of the phase, in order.
        """
        self.slots = slots
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

    def phase_at(self, step: int) -> int:
        """Return the phase whose examples slots begin at `step`, 0 for the first."""
        return sum(phase.first_step <= step for phase in self.phases) - 1

    @staticmethod
    def first_cursor(phase: int) -> int:
        """Return the cursor of a slot at its first example of `phase`."""
        return phase << _COUNT_BITS

    def following(self, cursor: int, phase: int) -> int:
        """Return the cursor after `cursor` of a slot that begins its next example in `phase`."""
        return cursor + 1 if cursor >> _COUNT_BITS == phase else self.first_cursor(phase)

    def begun(self, slots: np.ndarray, cursors: np.ndarray, phase: int) -> tuple[int, int]:
        """Return how many examples of `phase` precede `cursors` of `slots`, and those of its first epoch."""
        counts = np.where(cursors >> _COUNT_BITS == phase, cursors & ((1 << _COUNT_BITS) - 1), 0)
        of_epoch = -(-(self.phases[phase].size - slots) // self.slots)
        return int(counts.sum()), int(np.minimum(counts, of_epoch).sum())

    def _id(self, slot: int, cursor: int) -> int:
        return slot + cursor * self.slots

    def _place(self, id: int) -> tuple[StreamPhase, int, int]:
        """Return phase and epoch of an id, and the index of its example within the phase."""
        cursor, slot = divmod(id, self.slots)
        phase, count = divmod(cursor, 1 << _COUNT_BITS)
        epoch, offset = divmod(slot + count * self.slots, self.phases[phase].size)
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
        for slot, id in zip(slots, ids, strict=True):
            expected, ahead = self._ahead.pop(slot, (None, None))
            if ahead is None or expected != id:  # it has been left out since, or a phase has begun
                rows.append(self._read(id))
            else:
                rows.append(ahead.result())
            if self._pool is not None:
                following = id + self.slots
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
