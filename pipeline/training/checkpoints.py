"""When a run saves, how it resumes, and how it branches off another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.base.errors import Failure
from pipeline.chains.groups import SlotGroups
from pipeline.checkpoint.branching import check_state, find_parent, parent_of
from pipeline.checkpoint.manifest import FORMAT, Identity, Manifest
from pipeline.checkpoint.resuming import load
from pipeline.checkpoint.retention import remove_conversions
from pipeline.checkpoint.saving import Saver
from pipeline.config import Config
from pipeline.engine.protocol import Engine, FileLayout
from pipeline.model.batch import Vocabulary
from pipeline.resilience.stop import Stop
from pipeline.resilience.watchdog import Watchdog
from pipeline.training.state import TrainState
from pipeline.training.step_log import StepLog


def resume(folder: Path, saved: Manifest, engine: Engine, groups: SlotGroups, state: TrainState) -> None:
    """Restore weights, chains and state from a checkpoint; every rank calls this."""
    load(folder, saved, engine, groups)
    state.step, state.tokens, state.held_out_loss = saved.step, saved.tokens, saved.held_out_loss
    state.window.restore(saved.guard)
    state.parent = saved.parent
    if engine.ranks.is_first:
        other = saved.world_size != engine.ranks.world_size
        ranks = f", written by {saved.world_size} ranks" if other else ""
        stage = f", under {saved.sharding}" if saved.sharding != engine.sharding else ""
        print(f"resumed from {folder} (step {saved.step}{ranks}{stage})", flush=True)


def branch(config: Config, vocabulary: Vocabulary, engine: Engine, state: TrainState) -> None:
    """Begin a run as ``train.branch_from`` says; every rank calls this.

    The guard's window and the held-out loss begin anew, as the chains do: other settings, other losses.

    Raises:
        UserError: when the checkpoint does not fit the run, or is damaged.
    """
    ranks, place = engine.ranks, Path(config.run_dir) / "checkpoints"
    found: tuple[Path, Manifest] | None = None
    with ranks.agreeing():
        if ranks.is_first:  # for all: a run that is still training may save a newer one
            found = find_parent(config, vocabulary)
            state.parent = parent_of(*found)
            place.mkdir(exist_ok=True)
            remove_conversions(place)  # an earlier attempt may have been for another parent
    found, state.parent = ranks.all_gather((found, state.parent))[0]
    assert found is not None, "the first rank has raised an error otherwise"
    folder, saved = found
    with ranks.agreeing():
        check_state(folder, saved, config.checkpoint.verify_hashes, ranks)
    engine.load(folder / "model", FileLayout(saved.sharding, saved.world_size), place)
    state.step, state.tokens = saved.step, saved.tokens
    if ranks.is_first:
        print(f"branched from {folder} (step {saved.step})", flush=True)


@dataclass(eq=False)
class Checkpoints:
    """Saves the run every ``checkpoint.interval`` steps, at the last step and before it stops.

    Attributes:
        config: the run.
        identity: what a run that resumes must have in common with the checkpoints.
        state: progress of the run.
        groups: the chains of this rank.
        saver: writes the checkpoints.
        log: is on the disk before a checkpoint is.
        stop: whether the run is to stop.
        watchdog: watches the saves.
    """

    config: Config
    identity: Identity
    state: TrainState
    groups: SlotGroups
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
            state.window.to_json(), state.parent, self.groups.stream.dealt,
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
