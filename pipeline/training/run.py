"""A run with everything that it holds open, and what is done with it between the steps."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from pipeline import checkpoint, objectives
from pipeline.base import errors
from pipeline.base.progress import Progress
from pipeline.chains.slots import SlotGroup, make_groups
from pipeline.chains.stream import SlotStream
from pipeline.checkpoint import FORMAT, Manifest
from pipeline.config import Config
from pipeline.data.blend import describe_order, write_order
from pipeline.data.datasets import build_datasets, data_fingerprint
from pipeline.data.examples import ExampleDataset
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.runtime import agree, build_engine
from pipeline.huggingface.initial import open_initial_weights
from pipeline.model.batch import Vocabulary
from pipeline.monitor.example_log import ExampleLog
from pipeline.monitor.history import noted
from pipeline.monitor.recorder import Recorder
from pipeline.monitor.stragglers import Stragglers
from pipeline.monitor.texts import ShownText
from pipeline.monitor.writers import require_wandb
from pipeline.ranks import Launch
from pipeline.resilience.guard import Guard
from pipeline.resilience.signals import StopSignals
from pipeline.resilience.skipped import SkipLog
from pipeline.resilience.watchdog import Watchdog
from pipeline.training.held_out import held_out_bound, held_out_loss
from pipeline.training.preflight import check_run, check_validation, read_vocabulary
from pipeline.training.scheduled import schedule_tasks
from pipeline.training.shown_texts import write_texts


class Run:
    """A run with everything that it holds open."""

    def __init__(self, config: Config, launch: Launch, signals: StopSignals, stack: ExitStack) -> None:
        """Build data, engine and chains, and go on from the newest checkpoint where there is one."""
        if config.monitor.wandb:
            require_wandb()
        config = fit_micro_batch(config, launch)
        self.config = config
        self.folder = Path(config.run_dir)
        self.tokenizer = tokenizer = Tokenizer.load(Path(config.data.tokenizer))
        check_run(config, tokenizer, launch.world_size, disk=launch.rank == 0)
        vocabulary = read_vocabulary(config, tokenizer)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.engine = build_engine(config, launch, vocabulary)
        stack.callback(self.engine.close)
        self.take_folder(stack)
        self.manifest = Manifest(
            FORMAT, 0, 0, launch.world_size, self.engine.sharding, config.train.global_batch_size,
            vocabulary._asdict(), data_fingerprint(config.data, tokenizer, config.train.seed),
        )  # fmt: skip
        newest = self.find_start()
        self.tasks = schedule_tasks(config, tokenizer, self.engine)
        # What can be refused has been by now: to build the examples of a large corpus takes long.
        cache = Path(config.data.cache) if config.data.cache else self.folder / "dataset_cache"
        self.data = build_datasets(config.data, tokenizer, config.train.seed, cache)
        check_validation(config, self.data.valid is not None)
        self.stream = SlotStream(self.data.train, config.slots, config.train.seed, config.data.workers)
        stack.callback(self.stream.close)
        self.skip_log = SkipLog(self.folder, self.engine)
        self.stream.exclude(self.skip_log.excluded())
        self.objectives = objectives.build(config, tokenizer.mask, self.data.has_padding)
        self.turns = make_groups(config, launch, self.stream, self.objectives)
        self.groups = [group for turn in self.turns for group in turn]
        self.signals = signals
        self.guard = Guard(config.guard, config.optimizer.gradient_clip, lambda: signals.received)
        if newest is not None:
            self.load(*newest)
        self.report_order()
        self.progress = Progress(config.train.steps, self.manifest.step, "step", enabled=launch.rank == 0)
        stack.callback(self.progress.close)
        self.logs = stack.enter_context(ExitStack())
        self.open_logs()
        self.watchdog = Watchdog(config.watchdog, self.folder, launch.rank, config.engine.kind != "plain")
        stack.callback(self.watchdog.close)
        self.saver = checkpoint.Saver(config, self.engine, self.groups, self.progress.say)
        stack.callback(self.saver.close)
        if launch.rank == 0:
            before = self.recorder.lost_steps, self.recorder.last_sign
            stack.enter_context(
                noted(self.folder, self.manifest.step, launch.world_size, *before, self.outcome)
            )

    def groups_of(self, step: int) -> list[SlotGroup]:
        """Return the chains that `step` trains, a group for each micro-batch."""
        return self.turns[(step - 1) % len(self.turns)]

    def outcome(self) -> str:
        """Return how the process ended, if it was no error."""
        step, steps = self.manifest.step, self.config.train.steps
        if step == steps and not self.guard.stop:
            return "done"
        saved = "and saved" if self.saver.problem is None else "and NOT saved (the reason is above)"
        return f"stopped after step {step} {saved}"

    def report_order(self) -> None:
        """Show and write what each dataset gives to an epoch."""
        if self.engine.launch.rank == 0:
            write_order(self.folder, self.data.shares, self.data.fingerprint)
            print(describe_order(self.data.shares), flush=True)

    def take_folder(self, stack: ExitStack) -> None:
        """Make sure that no other run works on the folder, and clear up after one that was killed."""
        problem = None
        if self.engine.launch.rank == 0:
            try:
                stack.callback(checkpoint.RunLock(self.folder).release)
                checkpoint.clear(self.folder)
            except errors.UserError as error:
                problem = str(error)
        agree(self.engine, problem)

    def find_start(self) -> tuple[Path, Manifest] | None:
        """Return the newest whole checkpoint, if the run may go on from it; where there is none, begin."""
        found = checkpoint.newest(self.folder, self.engine, self.config.checkpoint.verify_hashes)
        if found is not None:
            checkpoint.check_continues(*found, self.manifest, self.config)
        elif self.config.train.initial_weights is not None:
            self.start_from(Path(self.config.train.initial_weights))
        return found

    def start_from(self, folder: Path) -> None:
        """Begin at given weights."""
        vocabulary, tokenizer = Vocabulary(**self.manifest.vocabulary), Path(self.config.data.tokenizer)
        self.engine.start_from(open_initial_weights(folder, self.config.model, vocabulary, tokenizer))
        if self.engine.launch.rank == 0:
            print(f"starting from the weights in {folder}", flush=True)

    def load(self, folder: Path, saved: Manifest) -> None:
        """Take up the state of a checkpoint."""
        checkpoint.load(folder, saved, self.engine, self.groups)
        self.advance_manifest(saved.step)
        self.manifest.held_out_loss = saved.held_out_loss
        self.guard.load_state_dict(saved.guard)
        if self.engine.launch.rank == 0:
            ranks = (
                ""
                if saved.world_size == self.manifest.world_size
                else f", written by {saved.world_size} ranks"
            )
            print(f"resumed from {folder} (step {saved.step}{ranks})", flush=True)

    def open_logs(self) -> None:
        """Open what is written step by step; what was written beyond the present step is dropped."""
        self.logs.close()
        first = self.manifest.step + 1
        stragglers = Stragglers(self.engine, self.stream)
        rows = self.manifest.vocabulary["rows"]
        self.recorder = Recorder(self.config, rows, self.engine, self.groups, stragglers, first)
        self.logs.callback(self.recorder.close)
        self.example_log: ExampleLog | None = None
        if self.config.train.log_samples:
            self.example_log = ExampleLog(self.folder, self.engine, self.stream, first)
            self.logs.callback(self.example_log.close)

    def refuse(self, step: int, problem: str) -> bool:
        """Note a step whose update the guard has refused; say whether the run had to go back for it."""
        ids = torch.full((self.stream.slots,), -1, device=self.engine.launch.device)
        for group in self.groups_of(step):
            ids[group.numbers] = group.trained_ids
        positions = self.engine.max_over_ranks(ids).tolist()
        turn = [position for position in positions if position >= 0]
        examples = [self.stream.index(position) for position in turn]
        in_a_row = self.guard.in_a_row
        self.skip_log.skip(step, problem, examples)
        self.progress.say(f"step {step} skipped: {problem} ({in_a_row} in a row, see {self.skip_log.path})")
        if in_a_row < self.config.guard.skips_before_rollback:
            return False
        self.roll_back(step)
        return True

    def roll_back(self, step: int) -> None:
        """Go back to the newest checkpoint, and leave out the examples of the steps that were refused."""
        self.watchdog.enter("rollback")
        self.saver.wait()
        found = checkpoint.newest(self.folder, self.engine, self.config.checkpoint.verify_hashes)
        limit = self.config.guard.max_rollbacks
        if found is None or self.skip_log.rollbacks_to(found[1].step) >= limit:
            before = "no checkpoint exists" if found is None else f"{found[0]} was gone back to {limit} times"
            raise errors.Failure(
                f"{self.guard.in_a_row} steps in a row were refused up to step {step}, and {before} "
                f"(guard.max_rollbacks): {self.guard.problem}. See {self.skip_log.path}; a lower "
                "optimizer.learning_rate or optimizer.gradient_clip may help."
            )
        self.skip_log.roll_back(step, found[1].step, self.guard.in_a_row)
        self.stream.exclude(self.skip_log.excluded())
        self.load(*found)
        self.guard.in_a_row = 0  # a checkpoint within the row would go on with it
        self.open_logs()
        self.progress.say(
            f"went back from step {step} to {found[0]}, without the examples of the skipped steps"
        )

    def advance_manifest(self, step: int) -> None:
        """Bring the facts of the next checkpoint up to a step that was just trained."""
        self.manifest.step = step
        self.manifest.tokens = step * self.config.train.global_batch_size * self.config.data.sequence_length
        self.manifest.held_out_loss = None

    def due(self, interval: int, step: int) -> bool:
        """Say whether something done every `interval` steps (0: never), and at the last one, is due.

        Within a row of refused steps it is not: they may end in a return to the checkpoint before.
        """
        last = step == self.config.train.steps
        return interval > 0 and (last or (step % interval == 0 and not self.guard.in_a_row))

    def stopped(self) -> bool:
        """Say before each batch of an evaluation whether a rank was asked to stop; every rank calls this."""
        self.watchdog.enter("evaluation")
        received = torch.tensor([float(self.signals.received)], device=self.engine.launch.device)
        self.guard.stop = self.guard.stop or bool(self.engine.max_over_ranks(received))
        return self.guard.stop

    def log(self) -> None:
        """Fetch, write and show the figures of the steps since the last time."""
        values = self.recorder.flush(self.skip_log.skipped())
        self.progress.report(
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"masked {values['masked_fraction']:.2f}  {values['tokens_per_second']:,.0f} tokens/s"
        )

    def evaluate(self) -> None:
        """If it is due, measure and write the held-out loss, of the averaged weights too where they are kept.

        A rank that is asked to stop cuts it short; it is made up for when the run goes on.
        """
        step, valid = self.manifest.step, self.data.valid
        written = "held_out/loss" in self.recorder.written_at(step)  # made up for, but not saved since
        if valid is None or written or not self.due(self.config.evaluation.interval, step):
            return
        with self.recorder.apart(step, "evaluation"):
            losses = self.held_out(valid)
            if self.config.optimizer.ema_decay is not None:
                with self.engine.averaged_weights():
                    losses |= self.held_out(valid, "ema_")
            self.recorder.write_texts(self.write_texts(valid))
        measured = {name: loss for name, loss in losses.items() if loss is not None}
        if len(measured) == len(losses):
            self.manifest.held_out_loss = measured.get("held_out/ema_loss", measured["held_out/loss"])
            self.recorder.write(step, measured)
            facts = ", ".join(f"{name} {loss:.4f}" for name, loss in measured.items())
            self.progress.say(f"step {step}: {facts} nats a masked token")

    def measure_tasks(self) -> None:
        """Measure and write the accuracy on each task that is due, with the averaged weights where there are.

        A stop cuts it short; what is missing is made up for when the run goes on.
        """
        step, written = self.manifest.step, self.recorder.written_at(self.manifest.step)
        for task in self.tasks:
            name = f"{task.settings.curve}/accuracy"
            if name in written or self.guard.stop or not self.due(task.settings.interval, step):
                continue
            averaged = self.config.optimizer.ema_decay is not None
            weights = self.engine.averaged_weights() if averaged else nullcontext()
            with self.recorder.apart(step, "evaluation"), weights:
                figures = task.measure(self.engine, step, self.stopped)
            if figures is not None:
                self.recorder.write(step, figures)
                without = task.total - len(task.items)
                note = f", {without} without room for an answer" if without else ""
                self.progress.say(f"step {step}: {name} {figures[name]:.4f} of {task.total} items{note}")

    def held_out(self, valid: ExampleDataset, prefix: str = "") -> dict[str, float | None]:
        """Return loss and bound on the validation examples by the present weights; nothing after a stop."""
        settings, batch_size = self.config.evaluation, self.config.train.micro_batch_size
        common = self.engine, valid, settings.samples, batch_size
        step, objective = self.manifest.step, self.objectives.at(self.manifest.step)
        found = {"loss": held_out_loss(*common, objective.held_out(), step, self.stopped)}
        if settings.bound_draws:
            found["bound"] = held_out_bound(
                *common, objective.layout, step, settings.bound_draws, self.stopped
            )
        return {f"held_out/{prefix}{name}": value for name, value in found.items()}

    def write_texts(self, valid: ExampleDataset) -> list[ShownText]:
        """Return what the model writes in the place of some validation examples; nothing after a stop."""
        count, step = min(self.config.monitor.texts, len(valid)), self.manifest.step
        layout = self.objectives.at(step).layout
        return write_texts(self.engine, valid, count, layout, self.tokenizer, step, self.stopped)

    def save(self) -> None:
        """Save the run, with all figures up to this step in their files first."""
        self.watchdog.enter("save")
        if self.recorder.pending:
            self.log()
        self.recorder.sync()
        self.skip_log.sync()
        self.manifest.guard = self.guard.state_dict()
        with self.recorder.apart(self.manifest.step, "checkpoint_stall"):
            self.saver.save(self.manifest)


def fit_micro_batch(config: Config, launch: Launch) -> Config:
    """Return the configuration with a micro-batch that fits the number of ranks; say so if it is smaller."""
    wanted, train = config.train, config.train.fitted(launch.data_size, launch.sequence_size)
    if launch.rank == 0 and train.micro_batch_size != wanted.micro_batch_size:
        print(
            f"train.micro_batch_size is {train.micro_batch_size} instead of {wanted.micro_batch_size}: it "
            f"must divide the {wanted.global_batch_size // launch.data_size} sequences of a rank and step",
            flush=True,
        )
    return dataclasses.replace(config, train=train)
