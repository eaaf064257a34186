"""Tasks during training, measured by the engine that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pipeline.base.errors import UserError
from pipeline.config import Config, TaskConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.batching import behind_prompts, stack_sequences, that_fit, up_to_end
from pipeline.decoding.sampling import SamplingSettings
from pipeline.engine.protocol import Engine
from pipeline.evaluation.intervals import wilson_interval
from pipeline.evaluation.tasks import TASKS
from pipeline.objectives import decoding_layout
from pipeline.ranks import Ranks
from pipeline.resilience.stop import Stop
from pipeline.training.filling import fill
from pipeline.training.sampled import ScheduledSamples
from pipeline.training.state import TrainState
from pipeline.training.step_log import StepLog


class Scheduled(Protocol):
    """One task with its items.

    Attributes:
        settings: what to measure, and when.
    """

    settings: TaskConfig

    def measure(self, engine: Engine, step: int, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Return the figures by the names of their curves, alike on all ranks; every rank calls this.

        Args:
            engine: runs the model.
            step: current optimizer step.
            stopped: whether to stop, asked before every forward; all ranks must agree.

        Returns:
            The figures; None after a stop.

        Raises:
            UserError: on every rank, if it can no longer be measured.
        """

    def describe(self, figures: dict[str, float]) -> str:
        """Return the figures in a line."""


class ScheduledTask(Scheduled):
    """A task with right answers; see `Scheduled` for the methods.

    Attributes:
        settings: what to measure, and when.
        total: number of items; those whose prompt leaves no room for an answer count as wrong.
    """

    def __init__(self, settings: TaskConfig, config: Config, tokenizer: Tokenizer) -> None:
        """Read the items, and check that they can be measured.

        Raises:
            UserError: for an unusable file, prompts that are all too long, or a task that cannot run here.
        """
        self.settings, self.config, self.tokenizer = settings, config, tokenizer
        with closing(TASKS[settings.task]()) as task:
            items = task.read(Path(settings.data))[: settings.samples]
            length = settings.length or task.answer_length(items)
        self.total = len(items)
        prompts = [item.prompt for item in items]
        try:
            fitting = that_fit(prompts, length, tokenizer, config)
            if not fitting:
                behind_prompts(prompts, length, tokenizer, config)  # raises the error of the first
        except UserError as error:
            raise UserError(f"evaluation.tasks, {settings.data}: {error}") from None
        self.items, self.sequences = [items[i] for i in fitting], list(fitting.values())

    def measure(self, engine: Engine, step: int, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Return the accuracy and its 95% interval."""
        ranks, count = engine.ranks, len(self.items)
        batch_size = self.config.train.micro_batch_size
        layout = decoding_layout(self.config, self.tokenizer.mask, step)
        sampler = SamplingSettings(tokens_per_step=self.settings.tokens_per_step)
        right = torch.zeros(1, dtype=torch.float64, device=ranks.device)
        with closing(TASKS[self.settings.task]()) as task:
            for indices in ranks.batches(count, batch_size):
                numbers = [i % count for i in indices]  # past the end: not counted
                sequences, kind = [self.sequences[i] for i in numbers], self.config.data.kind
                examples, masked = stack_sequences(sequences, numbers, kind, self.tokenizer.pad, ranks.device)
                found = fill(engine, examples, masked, layout, step, sampler, stopped, self.tokenizer.eos)
                if found is None:
                    return None
                answers = [
                    self.tokenizer.decode(up_to_end(self.tokenizer, row[where].tolist()))
                    for row, where in zip(found[0], masked, strict=True)
                ]
                items = self.items[indices.start : indices.stop]
                right += sum(verdict.right for verdict in task.score_all(items, answers[: len(items)]))
        count = round(float(ranks.sum(right)) / ranks.sequence_size)
        low, high = wilson_interval(count, self.total)
        return {"accuracy": count / self.total, "low": low, "high": high}

    def describe(self, figures: dict[str, float]) -> str:
        without = self.total - len(self.items)
        note = f", {without} without room for an answer" if without else ""
        return f"accuracy {figures['accuracy']:.4f} of {self.total} items{note}"


def read_tasks(config: Config, tokenizer: Tokenizer, ranks: Ranks) -> list[Scheduled]:
    """Return the tasks of a run; raise a `UserError` on every rank for one that cannot be measured."""
    tasks: list[Scheduled] = []
    for number, settings in enumerate(config.evaluation.tasks):
        if settings.samples_text:
            tasks.append(ScheduledSamples(number, config, tokenizer, ranks))
        else:
            with ranks.agreeing():
                tasks.append(ScheduledTask(settings, config, tokenizer))
    return tasks


@dataclass(eq=False)
class Tasks:
    """Measures each task of a run when it is due, by the averaged weights where they are kept.

    Attributes:
        tasks: the tasks of the run.
        engine: runs the model.
        averaged: whether the engine keeps averaged weights.
        state: progress of the run.
        log: receives the figures.
        stop: whether the run is to stop.
        stopped: whether to stop, asked before every forward; all ranks must agree.
    """

    tasks: Sequence[Scheduled]
    engine: Engine
    averaged: bool
    state: TrainState
    log: StepLog
    stop: Stop
    stopped: Callable[[], bool]

    def after_step(self) -> None:
        """Measure the tasks that are due.

        A stop cuts it short; the resumed run calls this again before its first step, for what is missing.
        """
        step, recorder = self.state.step, self.log.recorder
        for task in self.tasks:
            curve = task.settings.curve
            written = any(name.startswith(f"{curve}/") for name in recorder.written_at(step))
            if written or self.stop.agreed or not self.state.due(task.settings.interval):
                continue
            weights = self.engine.averaged_weights() if self.averaged else nullcontext()
            with recorder.apart(step, "evaluation"), weights:
                try:
                    figures = task.measure(self.engine, step, self.stopped)
                except UserError as error:  # on all ranks; the run is worth more than a point of a curve
                    self.log.progress.say(f"step {step}: {curve} is not measured: {error}")
                    figures = None
            if figures is not None:
                recorder.write(step, {f"{curve}/{name}": value for name, value in figures.items()})
                self.log.progress.say(f"step {step}: {curve}/{task.describe(figures)}")
