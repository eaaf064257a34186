"""The progress of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.checkpoint.manifest import Parent
from pipeline.resilience.guard import Window


@dataclass
class TrainState:
    """What changes from step to step, apart from weights and chains.

    Attributes:
        last_step: steps of the whole run, ``train.steps``.
        step: optimizer steps done.
        tokens: tokens seen, over all steps and ranks.
        held_out_loss: measured after this step; None if it was not.
        window: what the guard compares the next steps with.
        parent: the checkpoint that the run branched from, if any.
    """

    last_step: int
    step: int = 0
    tokens: int = 0
    held_out_loss: float | None = None
    window: Window = field(default_factory=Window)
    parent: Parent | None = None

    @property
    def branched_at(self) -> int:
        """The step at which the run branched off another one; 0 for a run of its own."""
        return 0 if self.parent is None else self.parent.step

    @property
    def is_done(self) -> bool:
        """Whether the last step is trained."""
        return self.step >= self.last_step

    def advance(self, tokens: int) -> None:
        """Count a step on `tokens` tokens."""
        self.step += 1
        self.tokens += tokens
        self.held_out_loss = None

    def due(self, interval: int) -> bool:
        """Return whether work done every `interval` steps (0 = never), and at the last step, is due now.

        It is not while steps are refused in a row, since they may end in a rollback.
        """
        if interval == 0 or self.step == 0:
            return False
        return self.is_done or (self.step % interval == 0 and not self.window.in_a_row)
