"""What follows when the guard refuses an update: the step is skipped, and after several the run goes back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline import checkpoint
from pipeline.base.errors import Failure
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import Config
from pipeline.resilience.guard import Guard
from pipeline.resilience.skipped import SkipLog
from pipeline.training.checkpointing import Checkpoints, resume
from pipeline.training.state import TrainState


class Recovery:
    """Skips refused steps, and goes back to the newest checkpoint after too many in a row."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        guard: Guard,
        stream: SlotStream,
        skipped: SkipLog,
        groups: Sequence[SlotGroup],
        checkpoints: Checkpoints,
    ) -> None:
        """Take what a rollback changes.

        Args:
            config: the run.
            state: of the run.
            guard: what refuses.
            stream: what leaves out the examples of refused steps.
            skipped: where refused steps are noted.
            groups: all chains of this rank.
            checkpoints: where the run goes back to.
        """
        self.config = config
        self.state = state
        self.guard = guard
        self.stream = stream
        self.skipped = skipped
        self.groups = groups
        self.checkpoints = checkpoints

    def rolled_back(self, trained: Sequence[SlotGroup]) -> bool:
        """Note the last step where the guard refused it; say whether the run had to go back for it.

        Every rank calls this after each step, with the chains that the step was trained on.

        Raises:
            Failure: when there is no checkpoint to go back to, or it was gone back to too often.
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
        """Return the numbers of the examples that a step was trained on, over all ranks."""
        ranks = self.checkpoints.saver.engine.ranks
        ids = torch.full((self.stream.slots,), -1, device=ranks.device)
        for group in trained:
            ids[group.numbers] = group.trained_ids
        return [self.stream.index(position) for position in ranks.max(ids).tolist() if position >= 0]

    def _roll_back(self) -> None:
        """Resume from the newest checkpoint, and leave out the examples of the steps that were refused."""
        step, in_a_row = self.state.step, self.state.window.in_a_row
        engine, log = self.checkpoints.saver.engine, self.checkpoints.log
        self.checkpoints.watchdog.enter("rollback")
        self.checkpoints.saver.wait()
        verify = self.config.checkpoint.verify_hashes
        found = checkpoint.newest(Path(self.config.run_dir), engine.ranks, verify)
        limit = self.config.guard.max_rollbacks
        if found is None or self.skipped.rollbacks_to(found[1].step) >= limit:
            before = "no checkpoint exists" if found is None else f"{found[0]} was gone back to {limit} times"
            raise Failure(
                f"{in_a_row} steps in a row were refused up to step {step}, and {before} "
                f"(guard.max_rollbacks): {self.guard.problem}. See {self.skipped.path}; a lower "
                "optimizer.learning_rate or optimizer.gradient_clip may help."
            )
        self.skipped.roll_back(step, found[1].step, in_a_row)
        self.stream.exclude(self.skipped.excluded())
        resume(*found, engine, self.groups, self.state)
        self.guard.problem = None
        self.state.window.in_a_row = 0  # a checkpoint saved within the row would count on
        log.reopen()
        log.progress.say(
            f"went back from step {step} to {found[0]}, without the examples of the skipped steps"
        )
