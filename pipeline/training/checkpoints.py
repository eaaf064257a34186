"""When a run saves, and how it resumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.errors import Failure
from pipeline.chains.slots import SlotGroup
from pipeline.checkpoint.loading import load
from pipeline.checkpoint.manifest import FORMAT, Identity, Manifest
from pipeline.checkpoint.saving import Saver
from pipeline.config import Config
from pipeline.engine.protocol import Engine
from pipeline.resilience.stop import Stop
from pipeline.resilience.watchdog import Watchdog
from pipeline.training.state import TrainState
from pipeline.training.step_log import StepLog


def resume(
    folder: Path, saved: Manifest, engine: Engine, groups: Sequence[SlotGroup], state: TrainState
) -> None:
    """Restore weights, chains and state from a checkpoint; every rank calls this."""
    load(folder, saved, engine, groups)
    state.step, state.tokens, state.held_out_loss = saved.step, saved.tokens, saved.held_out_loss
    state.window.restore(saved.guard)
    if engine.ranks.is_first:
        other = saved.world_size != engine.ranks.world_size
        ranks = f", written by {saved.world_size} ranks" if other else ""
        stage = f", under {saved.sharding}" if saved.sharding != engine.sharding else ""
        print(f"resumed from {folder} (step {saved.step}{ranks}{stage})", flush=True)


@dataclass(eq=False)
class Checkpoints:
    """Saves the run every ``checkpoint.interval`` steps, at the last step and before it stops.

    Attributes:
        config: the run.
        identity: what a run that resumes must have in common with the checkpoints.
        state: progress of the run.
        saver: writes the checkpoints.
        log: is on the disk before a checkpoint is.
        stop: whether the run is to stop.
        watchdog: watches the saves.
    """

    config: Config
    identity: Identity
    state: TrainState
    saver: Saver
    log: StepLog
    stop: Stop
    watchdog: Watchdog

    def after_step(self) -> None:
        """Save, if a save is due."""
        if self.stop.agreed or self.state.due(self.config.checkpoint.interval):
            self.save()

    def save(self) -> None:
        """Save the current state; every rank calls this."""
        self.watchdog.enter("save")
        self.log.sync()
        state, world_size = self.state, self.saver.engine.ranks.world_size
        manifest = Manifest(
            FORMAT, state.step, state.tokens, world_size, *self.identity, state.held_out_loss,
            state.window.to_json(),
        )  # fmt: skip
        with self.log.recorder.apart(state.step, "checkpoint_stall"):
            self.saver.save(manifest)

    def finish(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            Failure: when the last step could not be saved, since its weights would be lost.
        """
        self.watchdog.enter("save")
        self.saver.wait()
        if self.saver.problem is not None and self.state.is_done and not self.stop.agreed:
            raise Failure(
                f"the last step, {self.state.step}, is trained but not saved: {self.saver.problem} Put it "
                "right, and start the same command again: it resumes from the newest checkpoint."
            )
