"""This rank's chains, and how they become more where the batch grows (``train.batch_ramp``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import overload

import torch

from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import Config
from pipeline.objectives.seam import ObjectiveSchedule
from pipeline.ranks import Ranks


class SlotGroups(Sequence[SlotGroup]):
    """All chains of this rank: for each turn (``objective.turns``) one group per micro-batch.

    A slot stays on its rank and in its turn when the batch grows: each rank and turn holds an equal part of
    the first batch's slots, and an equal part of those that each larger batch adds.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        stream: SlotStream,
        objectives: ObjectiveSchedule,
        first_step: int = 1,
    ) -> None:
        """Begin the chains at `first_step`, which is not 1 in a run that branched off another one."""
        self.config, self.ranks, self.stream, self.objectives = config, ranks, stream, objectives
        self.begin(first_step)

    def begin(self, step: int, dealt: Mapping[int, Sequence[int]] | None = None) -> None:
        """Hold the slots of the batch before `step`, all of them with new chains; see `SlotStream.begin`."""
        self.stream.begin(step, dealt or {})
        self.size = 0
        self.turns: list[list[SlotGroup]] = [[] for _ in range(self.config.objective.turns)]
        for first_step, size in self.config.train.batches.items():
            if first_step < max(2, step):
                self._add(size, step)

    def _add(self, size: int, first_step: int) -> None:
        """Add the slots by which the batch grows to `size`, with chains that begin at `first_step`."""
        train, ranks, turns = self.config.train, self.ranks, len(self.turns)
        accumulation = (size - self.size) // (ranks.data_size * train.micro_batch_size)
        parts = slots_of_rank(ranks.data_rank, accumulation, train.micro_batch_size)
        for turn, groups in enumerate(self.turns):
            before = turns * self.size + turn * (size - self.size)  # slots
            groups += [
                SlotGroup(
                    [before + slot for slot in part], self.stream, self.objectives, ranks.device,
                    first_step + (turn - first_step + 1) % turns, turns,
                    compiled=self.config.engine.compile_functions, sources=self.config.data.sources,
                )
                for part in parts
            ]  # fmt: skip
        self.size = size

    def of_step(self, step: int) -> list[SlotGroup]:
        """Return the groups that `step` trains; if its batch is larger than before, the first call adds them.

        Every rank calls this before each step.
        """
        if self.config.train.batch_at(step) > self.size:
            slots = self.size * len(self.turns)
            begun = torch.zeros(slots, dtype=torch.int64, device=self.ranks.device)
            deal = self.stream.deal_at(step - 1)
            for group in self:
                begun[group.numbers] = torch.from_numpy(group.begun_of(deal)).to(begun.device)
            self.stream.deal(step, self.ranks.max(begun).tolist())
            self._add(self.config.train.batch_at(step), step)
        return self.turns[(step - 1) % len(self.turns)]

    @overload
    def __getitem__(self, index: int) -> SlotGroup: ...

    @overload
    def __getitem__(self, index: slice) -> list[SlotGroup]: ...

    def __getitem__(self, index: int | slice) -> SlotGroup | list[SlotGroup]:
        """Return groups by their place on this rank, turn after turn."""
        return list(self)[index]

    def __iter__(self) -> Iterator[SlotGroup]:
        """Return the groups of this rank, turn after turn."""
        return chain.from_iterable(self.turns)

    def __len__(self) -> int:
        """Return the number of groups of this rank."""
        return sum(map(len, self.turns))


def slots_of_rank(rank: int, accumulation: int, micro_batch_size: int) -> list[list[int]]:
    """Return the slot numbers of each micro-batch of a rank: consecutive, in rank order."""
    first = rank * accumulation * micro_batch_size
    return [
        list(range(first + i * micro_batch_size, first + (i + 1) * micro_batch_size))
        for i in range(accumulation)
    ]
