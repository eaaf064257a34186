"""Deals: how the examples of a phase of the data are dealt to the slots, from a step on.

Where the batch grows, slots are added. A slot reads every S-th position of the stream, and S has changed: the
positions that no slot has begun are put in order and dealt out anew, round after round. So none is left out
and none comes twice, wherever the chains stand. Had all slots of the largest batch their positions from the
start, those of the first batch would be in a later epoch while the others' examples had not been seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Deal:
    """A deal: entry i of its list of positions goes to slot (i + first_slot) mod S, as the (i div S)-th.

    Attributes:
        first_step: from which on slots begin its examples.
        phase: of the data.
        slots: S.
        known: whether the list is known; that of a larger batch is not before its first step.
        first_slot: which gets the first entry. A new one: the old slots begin their next examples later.
        left: [n] int64, the first entries, ascending: positions that were passed over before.
        rest: the position of entry n; the following ones follow.
        begun: positions of the phase begun before, and those of its first epoch.
    """

    first_step: int
    phase: int
    slots: int
    known: bool = True
    first_slot: int = 0
    left: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    rest: int = 0
    begun: tuple[int, int] = (0, 0)

    def position(self, slot: int, count: int) -> int:
        """Return the position of the example that `slot` begins after `count` others."""
        entry = (slot - self.first_slot) % self.slots + count * self.slots
        return int(self.left[entry]) if entry < len(self.left) else self.rest + entry - len(self.left)

    def counts_below(self, position: int, slots: np.ndarray) -> np.ndarray:
        """Return how many positions below `position` each of the `slots` has."""
        entries = np.searchsorted(self.left, position) + max(0, position - self.rest)
        return np.maximum(0, -(-(entries - (slots - self.first_slot) % self.slots) // self.slots))

    def dealt_anew(self, step: int, slots: int, begun: Sequence[int], size: int) -> Deal:
        """Return the deal of what is left at `step` to more `slots`.

        Args:
            step: the first one of the new deal.
            slots: S from then on.
            begun: positions that each slot has begun.
            size: examples of an epoch.
        """
        counts, everyone = np.asarray(begun, dtype=np.int64), np.arange(self.slots)
        rounds = np.arange(counts.min(), counts.max())[:, None]  # those that only some slots have begun
        passed_over = (everyone + rounds * self.slots)[rounds >= np.roll(counts, -self.first_slot)]
        of_left, end = passed_over < len(self.left), self.slots * int(counts.max())
        left = [
            self.left[passed_over[of_left]],
            self.rest + passed_over[~of_left] - len(self.left),
            self.left[end:],
        ]
        first_epoch = np.minimum(counts, self.counts_below(size, everyone))
        total = (self.begun[0] + int(counts.sum()), self.begun[1] + int(first_epoch.sum()))
        rest = self.rest + max(0, end - len(self.left))
        return Deal(step, self.phase, slots, True, self.slots, np.concatenate(left), rest, total)
