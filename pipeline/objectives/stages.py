"""K, the number of stages of a chain, as a function of the step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StageSchedule:
    """K grows from `start` by `increment` at step `first_increase` and every `interval` steps after it.

    K depends on the step alone, so a resumed run needs no state of it. The paper's text runs have 12 stages,
    3 more every 30,000 steps from step 60,000, and 42 from step 330,000.

    Attributes:
        start: K of the first step.
        increment: stages added at each increase; 0 = K never changes.
        first_increase: the first step with more stages.
        interval: steps between two increases.
        maximum: the largest K; none = no limit.
    """

    start: int
    increment: int = 0
    first_increase: int = 1
    interval: int = 1
    maximum: int | None = None

    def __call__(self, step: int) -> int:
        """Return K at `step` (1 is the first)."""
        if self.increment == 0 or step < self.first_increase:
            return self.start
        increases = 1 + (step - self.first_increase) // self.interval
        grown = self.start + self.increment * increases
        return grown if self.maximum is None else min(grown, self.maximum)

    def following(self, stage: Tensor, step: int, next_step: int) -> Tensor:
        """Return the stage, in the K of `next_step`, that comes after `stage` in the K of `step`.

        It is the first one that begins no earlier than `stage` ends: with an unchanged K, the next. So a
        chain comes on by at least 1/K of its way each time, whatever K does, and an ended one stays ended.
        """
        before, after = self(step), self(next_step)
        return ((stage + 1) * after + before - 1) // before
