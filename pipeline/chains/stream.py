"""Streams of examples, one per slot: each example once an epoch, at any world size and accumulation.

Position p of the endless stream is example p mod N of epoch p div N, and each epoch has its own permutation.
Slot s of S reads the positions s, s + S, s + 2S, ... Its cursor, the number of chains that it has begun, is
the whole state.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from pipeline.base.errors import Failure
from pipeline.data.examples import Array, ExampleDataset, Examples, stack_examples

_ROUNDS = 4
_EPOCHS = 256  # permutations kept; far fewer epochs are in use at once


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


class SlotStream:
    """Reads the examples of any slot by cursor, and prefetches the next one of each."""

    def __init__(self, dataset: ExampleDataset, slots: int, seed: int, workers: int) -> None:
        """Make the stream.

        Args:
            dataset: examples of an epoch.
            slots: S, slots over all ranks.
            seed: seed of the permutations.
            workers: prefetching threads; with 0, `read` itself reads. It does not change the examples.
        """
        self.dataset = dataset
        self.slots = slots
        self.size = len(dataset)
        self._permutation = lru_cache(_EPOCHS)(lambda epoch: Permutation(self.size, seed, epoch))
        self._ahead: dict[int, tuple[int, Future[dict[str, Array]]]] = {}  # slot: (position, example)
        self._waited = 0.0
        self._excluded: frozenset[int] = frozenset()
        self._pool = ThreadPoolExecutor(workers, "samples") if workers else None

    def index(self, position: int) -> int:
        """Return the example index of a stream position."""
        epoch, offset = divmod(position, self.size)
        return self._permutation(epoch)(offset)

    def exclude(self, examples: Iterable[int]) -> None:
        """Leave these examples out of every epoch; slots skip to the next example of their stream.

        Raises:
            Failure: when that is half of the examples or more: then the examples are not the cause.
        """
        self._excluded = frozenset(examples)
        if 2 * len(self._excluded) >= self.size:
            raise Failure(
                f"{len(self._excluded)} of {self.size} training examples would be left out as harmful: look "
                "for another cause (skipped.jsonl of the run, the learning rate, a defective GPU)."
            )

    def admitted(self, slots: Sequence[int], cursors: Sequence[int]) -> list[int]:
        """Return for each slot the first cursor, at or after its own, whose example is not left out."""
        admitted = []
        for slot, cursor in zip(slots, cursors, strict=True):
            while self._excluded and self.index(slot + cursor * self.slots) in self._excluded:
                cursor += 1
            admitted.append(cursor)
        return admitted

    def _read(self, position: int) -> dict[str, Array]:
        return self.dataset[self.index(position)]

    def read(self, slots: Sequence[int], cursors: Sequence[int]) -> Examples:
        """Return the examples at `cursors` of `slots`, on the CPU, and prefetch those that follow."""
        began = time.perf_counter()
        positions = [s + c * self.slots for s, c in zip(slots, cursors, strict=True)]
        rows = []
        for slot, position in zip(slots, positions, strict=True):
            expected, ahead = self._ahead.pop(slot, (None, None))
            if ahead is None or expected != position:  # the prefetched one has been left out since
                rows.append(self._read(position))
            else:
                rows.append(ahead.result())
            if self._pool is not None:
                following = position + self.slots
                self._ahead[slot] = following, self._pool.submit(self._read, following)
        examples = stack_examples(rows, positions)
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
