"""The slots' sub-streams: every example once an epoch, whatever rank, accumulation or thread reads it.

The endless stream of examples is numbered: position p is example p mod N of epoch p div N, in an order of the
epoch's own. Slot s of S reads the positions s, s + S, s + 2S, ...; the number of sequences that a slot has
begun, its cursor, is all that has to be remembered.
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
_EPOCHS = 256  # whose permutations are remembered; those under way are far fewer


class Permutation:
    """A keyed pseudo-random permutation of 0..size-1 in constant memory.

    A Feistel network over the smallest even number of bits that holds `size`, walked until the value falls
    inside (Black and Rogaway 2002, Ciphers with arbitrary finite domains): at most 4 walks on average.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)
        self.keys = [int(k) for k in np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)]

    def __call__(self, index: int) -> int:
        """Return where `index` (0 <= index < size) goes."""
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
    """Reads the examples of any slot by cursor, one ahead of the reader."""

    def __init__(self, dataset: ExampleDataset, slots: int, seed: int, workers: int) -> None:
        """Make the stream.

        Args:
            dataset: the examples of an epoch.
            slots: S, the number of slots over all ranks (the global batch size).
            seed: seed of the order.
            workers: reading threads; 0 reads when asked. The examples are the same for any number.
        """
        self.dataset = dataset
        self.slots = slots
        self.size = len(dataset)
        self._permutation = lru_cache(_EPOCHS)(lambda epoch: Permutation(self.size, seed, epoch))
        self._ahead: dict[int, tuple[int, Future[dict[str, Array]]]] = {}  # by slot: position, its example
        self._waited = 0.0
        self._excluded: frozenset[int] = frozenset()
        self._pool = ThreadPoolExecutor(workers, "samples") if workers else None

    def index(self, position: int) -> int:
        """Return the example index of a stream position."""
        epoch, offset = divmod(position, self.size)
        return self._permutation(epoch)(offset)

    def exclude(self, examples: Iterable[int]) -> None:
        """Leave out these examples of every epoch from now on; slots go on to the next of their sub-stream.

        Raises:
            Failure: when half of the examples or more would be left out: it is not they who are to blame.
        """
        self._excluded = frozenset(examples)
        if 2 * len(self._excluded) >= self.size:
            raise Failure(
                f"{len(self._excluded)} of {self.size} training examples would be left out as harmful: look "
                "for another cause (skipped.jsonl of the run, the learning rate, a defective GPU)."
            )

    def admitted(self, slots: Sequence[int], cursors: Sequence[int]) -> list[int]:
        """Return for each slot the first cursor, from `cursors` on, whose example is not left out."""
        admitted = []
        for slot, cursor in zip(slots, cursors, strict=True):
            while self._excluded and self.index(slot + cursor * self.slots) in self._excluded:
                cursor += 1
            admitted.append(cursor)
        return admitted

    def _read(self, position: int) -> dict[str, Array]:
        return self.dataset[self.index(position)]

    def read(self, slots: Sequence[int], cursors: Sequence[int]) -> Examples:
        """Return the examples at `cursors` of `slots`, on the CPU, and begin to read those that follow."""
        began = time.perf_counter()
        positions = [s + c * self.slots for s, c in zip(slots, cursors, strict=True)]
        rows = []
        for slot, position in zip(slots, positions, strict=True):
            expected, ahead = self._ahead.pop(slot, (None, None))
            if ahead is None or expected != position:  # examples that are left out were read in vain
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
        """Return the seconds that `read` has taken since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stop the reading threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
