"""After the guard refuses an update: skip the step, and roll back after several in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.base.errors import Failure
from pipeline.chains.groups import SlotGroups
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.checkpoint.resuming import newest
from pipeline.config import Config
from pipeline.resilience.guard import Guard
from pipeline.resilience.skipped import SkipLog
from pipeline.training.checkpoints import Checkpoints, resume
from pipeline.training.state import TrainState


@dataclass(eq=False)
class Recovery:
    """Skips refused steps; rolls back to the newest checkpoint after too many in a row.

    Attributes:
        config: the run.
        state: progress of the run.
        guard: refuses updates.
        stream: leaves out the examples of refused steps.
        skipped: log of refused steps.
        groups: all chains of this rank.
        checkpoints: checkpoints of the run.
    """

    config: Config
    state: TrainState
    guard: Guard
    stream: SlotStream
    skipped: SkipLog
    groups: SlotGroups
    checkpoints: Checkpoints

    def rolled_back(self, trained: Sequence[SlotGroup]) -> bool:
        """Log the last step if the guard refused it; return whether the run was rolled back.

        Every rank calls this after each step, with the chains that the step trained.

        Raises:
            Failure: when there is no checkpoint, or ``guard.max_rollbacks`` is used up.
        """
        problem, log = self.guard.problem, self.checkpoints.log
        if problem is None:
            return False
        self.skipped.skip(self.state.step, problem, self._examples(trained))
        in_a_row = self.state.window.in_a_row
        log.progress.say(
            f"step {self.state.step} skipped: {problem} ({in_a_row} in a row, see {self.skipped.path})"
        )
        if in_a_row < self.config.guard.skips_before_rollback:
            return False
        self._roll_back()
        return True

    def _examples(self, trained: Sequence[SlotGroup]) -> list[int]:
        """Return the numbers of the examples that a step trained, over all ranks."""
        ranks = self.checkpoints.saver.engine.ranks
        ids = torch.full((self.config.slots,), -1, device=ranks.device)
        for group in trained:
            ids[group.numbers] = group.trained_ids
        return [self.stream.index(id) for id in ranks.max(ids).tolist() if id >= 0]

    def _roll_back(self) -> None:
        """Resume from the newest checkpoint, without the examples of the refused steps."""
        step, in_a_row = self.state.step, self.state.window.in_a_row
        engine, log = self.checkpoints.saver.engine, self.checkpoints.log
        self.checkpoints.watchdog.enter("rollback")
        self.checkpoints.saver.wait()
        verify = self.config.checkpoint.verify_hashes
        found = newest(Path(self.config.run_dir), engine.ranks, verify)
        limit = self.config.guard.max_rollbacks
        if found is None or self.skipped.rollbacks_to(found[1].step) >= limit:
            before = "no checkpoint exists" if found is None else f"{limit} rollbacks to {found[0]} failed"
            raise Failure(
                f"{in_a_row} steps in a row were refused up to step {step}, and {before} "
                f"(guard.max_rollbacks): {self.guard.problem}. See {self.skipped.path}; a lower "
                "optimizer.learning_rate or optimizer.gradient_clip may help."
            )
        self.skipped.roll_back(step, found[1].step, in_a_row)
        self.stream.exclude(self.skipped.excluded())
        resume(*found, engine, self.groups, self.state)
        self.guard.problem = None
        self.state.window.in_a_row = 0  # the checkpoint may have been saved within the row
        log.reopen()
        log.progress.say(
            f"rolled back from step {step} to {found[0]}, without the examples of the skipped steps"
        )
