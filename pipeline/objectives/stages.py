"""The number of stages K of a chain, as a function of the step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StageSchedule:
    """Increase K from `start` by `increment` at step `first_increase` and every `interval` steps after it.

    K depends only on the step, so it needs no state in a checkpoint. The text runs of the PUMA paper (arXiv
    2602.10314) start with 12 stages, add 3 every 30,000 steps from step 60,000, and reach 42 at step 330,000.

    Attributes:
        start: K at the first step.
        increment: stages added at each increase; 0 = constant K.
        first_increase: the first step with more stages.
        interval: steps between increases.
        maximum: the largest K; None = no limit.
    """

    start: int
    increment: int = 0
    first_increase: int = 1
    interval: int = 1
    maximum: int | None = None

    def __call__(self, step: int) -> int:
        """Return K at `step`, counted from 1."""
        if self.increment == 0 or step < self.first_increase:
            return self.start
        increases = 1 + (step - self.first_increase) // self.interval
        grown = self.start + self.increment * increases
        return grown if self.maximum is None else min(grown, self.maximum)

    def following(self, stage: Tensor, step: int, next_step: int) -> Tensor:
        """Return the stage at `next_step`, with its K, that follows `stage` at `step`.

        This is the first stage that begins no earlier than `stage` ends; with a constant K, the next one. So
        a chain always advances by at least 1/K, and a finished chain stays finished when K changes.
        """
        before, after = self(step), self(next_step)
        return ((stage + 1) * after + before - 1) // before
