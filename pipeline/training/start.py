"""Build a run from its settings. Everything that a part needs is an argument of what builds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline import objectives
from pipeline.base.progress import Progress
from pipeline.chains.groups import SlotGroups
from pipeline.chains.stream import SlotStream
from pipeline.checkpoint.lock import RunLock
from pipeline.checkpoint.manifest import Identity, Manifest
from pipeline.checkpoint.resuming import check_continues, newest
from pipeline.checkpoint.retention import prepare
from pipeline.checkpoint.saving import Saver
from pipeline.config import Config
from pipeline.data.blend import Order, describe_order, write_order
from pipeline.data.datasets import Datasets, build_datasets, data_fingerprint
from pipeline.data.examples import ExampleDataset
from pipeline.data.facts import DatasetFacts
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.huggingface.folders import check_sums
from pipeline.huggingface.initial import open_initial_weights
from pipeline.model.batch import Vocabulary
from pipeline.monitor.example_log import ExampleLog
from pipeline.monitor.history import noted
from pipeline.monitor.machine import machine_of
from pipeline.monitor.recorder import Recorder
from pipeline.monitor.stragglers import Stragglers
from pipeline.monitor.writers import require_wandb
from pipeline.planning.data_use import data_use
from pipeline.ranks import Ranks
from pipeline.resilience.guard import Guard
from pipeline.resilience.signals import StopSignals
from pipeline.resilience.skipped import SkipLog
from pipeline.resilience.stop import Stop
from pipeline.resilience.watchdog import Watchdog
from pipeline.training.checkpoints import Checkpoints, branch, resume
from pipeline.training.fetching import fetch_datasets
from pipeline.training.preflight import check_run, check_validation, read_vocabulary
from pipeline.training.recovery import Recovery
from pipeline.training.scheduled import Scheduled, Tasks, read_tasks
from pipeline.training.state import TrainState
from pipeline.training.step_log import StepLog
from pipeline.training.tracing import Tracer
from pipeline.training.validation import Validation


class Component(Protocol):
    """Work between two steps that knows when it is due."""

    def after_step(self) -> None:
        """Do what is due after the step that was just trained; every rank calls this."""


@dataclass(frozen=True)
class Training:
    """Everything that the training loop uses.

    Attributes:
        config: the run; its micro-batch fits the world size.
        engine: executes the steps.
        groups: this rank's chains.
        state: progress of the run.
        guard: judges each update before it happens.
        stop: whether the run is to stop.
        watchdog: ends a run that hangs.
        log: curves and terminal.
        recovery: handles refused updates.
        evaluations: measures between steps.
        checkpoints: saves the run.
        tracer: traces single steps.
    """

    config: Config
    engine: Engine
    groups: SlotGroups
    state: TrainState
    guard: Guard
    stop: Stop
    watchdog: Watchdog
    log: StepLog
    recovery: Recovery
    evaluations: tuple[Component, ...]
    checkpoints: Checkpoints
    tracer: Tracer

    def outcome(self) -> str:
        """Return how the process ended, unless by an error."""
        if self.state.is_done and not self.stop.agreed:
            return "done"
        failed = self.checkpoints.saver.problem is not None
        saved = "and NOT saved (the reason is above)" if failed else "and saved"
        return f"stopped after step {self.state.step} {saved}"


def start(config: Config, ranks: Ranks, signals: StopSignals, stack: ExitStack) -> Training:
    """Return a run that is ready for its next step; `stack` closes what it holds open.

    Checks come first: an engine takes long to build, and the example indices of a large corpus longer.

    Raises:
        UserError: on every rank, for the first reason why the run cannot start.
    """
    with ranks.agreeing():
        config = fit_micro_batch(config, ranks)
        tokenizer = Tokenizer.load(Path(config.data.tokenizer))
        if config.monitor.wandb:
            require_wandb()
    config = dataclasses.replace(config, data=fetch_datasets(config.data, _cache(config), ranks))
    with ranks.agreeing():
        facts = check_run(config, tokenizer, ranks.world_size, disk=ranks.is_first)
        vocabulary = read_vocabulary(config, tokenizer)
    engine = build_engine(config, ranks, vocabulary)
    stack.callback(engine.close)
    _take_folder(Path(config.run_dir), ranks, stack)
    fingerprint, *later = (
        (str(step), data_fingerprint(settings, facts, tokenizer, config.train.seed))
        for _, step, settings in config.data.by_phase()
    )
    batch_size = config.train.global_batch_size
    identity = Identity(engine.sharding, batch_size, vocabulary._asdict(), fingerprint[1], dict(later))
    found = newest(Path(config.run_dir), ranks, config.checkpoint.verify_hashes)
    state = TrainState(config.train.steps)
    if found is not None:
        with ranks.agreeing():
            check_continues(*found, identity, config)
    elif config.train.branch_from is not None:
        branch(config, vocabulary, engine, state)
    elif config.train.initial_weights is not None:
        _start_from(Path(config.train.initial_weights), config, vocabulary, engine)
    tasks = read_tasks(config, tokenizer, ranks)
    data = _open_data(config, facts, tokenizer, ranks)
    return _assemble(config, tokenizer, engine, identity, state, found, tasks, facts, data, signals, stack)


def _assemble(
    config: Config,
    tokenizer: Tokenizer,
    engine: Engine,
    identity: Identity,
    state: TrainState,
    found: tuple[Path, Manifest] | None,
    tasks: Sequence[Scheduled],
    facts: Mapping[str, DatasetFacts],
    data: Mapping[int, Datasets],
    signals: StopSignals,
    stack: ExitStack,
) -> Training:
    """Begin the chains or resume them from the checkpoint `found`, and build what surrounds the loop."""
    run_dir, ranks = Path(config.run_dir), engine.ranks
    first, later = data[1], {step: phase.train for step, phase in data.items() if step > 1}
    slots = {step: size * config.objective.turns for step, size in config.train.batches.items()}
    stream = SlotStream(first.train, slots.pop(1), config.train.seed, config.data.workers, later, slots)
    stack.callback(stream.close)
    skipped = SkipLog(run_dir, ranks)
    stream.exclude(skipped.excluded())
    schedule = objectives.build(config, tokenizer.mask, any(phase.has_padding for phase in data.values()))
    groups = SlotGroups(config, ranks, stream, schedule, state.step + 1)
    if found is not None:
        resume(*found, engine, groups, state)
    log = _open_log(config, identity.vocabulary["rows"], engine, stream, groups, skipped, state)
    stack.callback(log.close)
    watchdog = Watchdog(config.watchdog, run_dir, ranks.rank, config.engine.kind != "plain")
    stack.callback(watchdog.close)
    saver = Saver(config, engine, groups, facts.values(), log.progress.say)
    stack.callback(saver.close)
    stop = Stop(ranks, lambda: signals.received)
    guard = Guard(config.guard, config.optimizer.gradient_clip, state.window, stop)
    checkpoints = Checkpoints(config, identity, state, groups, saver, log, stop, watchdog)

    def stopped() -> bool:
        watchdog.enter("evaluation")
        return stop.ask()

    averaged = config.optimizer.ema_decay is not None
    evaluations = (
        Validation(config, engine, *_held_out(config, data), schedule, tokenizer, state, log, stopped),
        Tasks(tasks, engine, averaged, state, log, stop, stopped),
    )
    recovery = Recovery(config, state, guard, stream, skipped, groups, checkpoints)
    tracer = Tracer(config, ranks, state, log.recorder.clock)
    stack.callback(tracer.close)
    training = Training(
        config, engine, groups, state, guard, stop, watchdog, log, recovery, evaluations, checkpoints, tracer
    )
    machine = machine_of(ranks)
    if ranks.is_first:
        before = log.recorder.lost_steps, log.recorder.last_sign
        parent = str(state.parent or "")
        stack.enter_context(
            noted(run_dir, state.step, ranks.world_size, *before, machine, training.outcome, parent)
        )
    return training


def fit_micro_batch(config: Config, ranks: Ranks) -> Config:
    """Return the configuration with a micro-batch that fits the world size; print it if it is smaller."""
    wanted, train = config.train, config.train.fitted(ranks.data_size, ranks.sequence_size)
    if ranks.is_first and train.micro_batch_size != wanted.micro_batch_size:
        shares = ", ".join(str(size // ranks.data_size) for size in wanted.batches.values())
        print(
            f"train.micro_batch_size is {train.micro_batch_size} instead of {wanted.micro_batch_size}: it "
            f"must divide the {shares} sequences of a rank and step",
            flush=True,
        )
    return dataclasses.replace(config, train=train)


def _take_folder(run_dir: Path, ranks: Ranks, stack: ExitStack) -> None:
    """Lock the run folder, and prepare it for checkpoints."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with ranks.agreeing():
        if ranks.is_first:
            stack.callback(RunLock(run_dir).release)
            prepare(run_dir)


def _start_from(folder: Path, config: Config, vocabulary: Vocabulary, engine: Engine) -> None:
    """Replace the random weights by those in `folder`."""
    with engine.ranks.agreeing():
        if config.checkpoint.verify_hashes and engine.ranks.is_first:
            check_sums(folder)
    weights = open_initial_weights(folder, config.model, vocabulary, Path(config.data.tokenizer))
    engine.start_from(weights)
    if engine.ranks.is_first:
        print(f"starting from the weights in {folder}", flush=True)


def _cache(config: Config) -> Path:
    """Return the folder for indices, and for datasets that are fetched."""
    return Path(config.data.cache) if config.data.cache else Path(config.run_dir) / "dataset_cache"


def _open_data(
    config: Config, facts: Mapping[str, DatasetFacts], tokenizer: Tokenizer, ranks: Ranks
) -> dict[int, Datasets]:
    """Build or load the example indices of each phase, by its first step; print and write what it uses."""
    run_dir, cache = Path(config.run_dir), _cache(config)
    data: dict[int, Datasets] = {}
    orders: list[Order] = []
    for _, step, settings in config.data.by_phase():
        data[step] = built = build_datasets(settings, facts, tokenizer, config.train.seed, cache, ranks)
        before = sum(len(data[order.first_step].train) for order in orders)
        orders.append(Order(step, before, built.fingerprint, built.shares))
    check_validation(config, data[1].valid is not None)
    if ranks.is_first:
        write_order(run_dir, orders)
        for order, use in zip(orders, data_use(config, [order.shares for order in orders]), strict=True):
            print(f"{describe_order(order.shares)}\n{use.describe()}", flush=True)
    return data


def _held_out(
    config: Config, data: Mapping[int, Datasets]
) -> tuple[list[ExampleDataset], list[dict[str, int]]]:
    """Return the validation examples, and the mix of each phase: training examples by name of the source.

    Of the first phase come the examples of all its datasets, of each later one those of the datasets that it
    adds, from the start of the run.
    """
    names = dict(zip(config.data.all_prefixes, config.data.sources, strict=False))  # none for one dataset
    phases = zip(data.values(), config.data.added_prefixes, strict=True)
    found = [phase.valid_of(added) for phase, added in phases]
    mixes = [{names[share.prefix]: share.used for share in phase.shares if names} for phase in data.values()]
    return [valid for valid in found if valid is not None], mixes if len(mixes) > 1 else []


def _open_log(
    config: Config,
    vocabulary_rows: int,
    engine: Engine,
    stream: SlotStream,
    groups: SlotGroups,
    skipped: SkipLog,
    state: TrainState,
) -> StepLog:
    """Open curves and terminal; drop what an interrupted run wrote beyond the current step."""
    ranks, first_step = engine.ranks, state.step + 1
    progress = Progress(state.last_step, state.step, "step", enabled=ranks.is_first)
    stragglers = Stragglers(ranks, stream)
    recorder = Recorder(config, vocabulary_rows, engine, groups, stragglers, first_step)
    examples = None
    if config.train.log_samples:
        examples = ExampleLog(Path(config.run_dir), ranks, stream, first_step)
    return StepLog(state, config.train.log_interval, recorder, examples, skipped, progress)
