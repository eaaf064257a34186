"""Settings of what happens between the steps: checkpoints, evaluation, profiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.checks import require, require_positive
from pipeline.config.training import EngineConfig


@dataclass
class CheckpointConfig:
    """When the run is saved, and what is kept.

    Args:
        interval: Steps between two checkpoints; the last step is always saved.
        asynchronous: Write behind the training, from a copy in host memory; false = train on when all is on
            the disk.
        keep: Newest checkpoints that are kept.
        keep_every: Also keep for ever those whose step is a multiple of this; 0 = none.
        keep_best: Also keep so many with the lowest held-out loss; needs evaluations at the saved steps.
        max_failed_saves: Stop after so many failed saves in a row (full disk, lost permission).
        verify_hashes: Before going on from a checkpoint, read every file and compare its hash; false = sizes
            only.
    """

    interval: int = 1000
    asynchronous: bool = True
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    max_failed_saves: int = 3
    verify_hashes: bool = True

    def check(self, evaluation_interval: int) -> None:
        """Raise a `UserError` for the first setting that cannot work with evaluations at such an interval."""
        require_positive("checkpoint", self, "interval", "keep", "max_failed_saves")
        for key in ("keep_every", "keep_best"):
            value = getattr(self, key)
            require(value >= 0, f"checkpoint.{key} is {value}: it must be 0 or more.")
        require(
            self.keep_every % self.interval == 0,
            f"checkpoint.keep_every is {self.keep_every}: make it a multiple of checkpoint.interval = "
            f"{self.interval}, or no checkpoint is ever at such a step.",
        )
        require(
            self.keep_best == 0 or (evaluation_interval > 0 and self.interval % evaluation_interval == 0),
            f"checkpoint.keep_best is {self.keep_best}, but checkpoint.interval = {self.interval} is no "
            f"multiple of evaluation.interval = {evaluation_interval}: the saved steps would have no "
            "held-out loss.",
        )


@dataclass
class TaskConfig:
    """A task of `tools/evaluate.py` whose accuracy is measured during training.

    Args:
        task: How answers are judged.
        data: File of its items: of GSM8K with question and answer, else with prompt and answer.
        interval: Steps between two measurements; the last step always has one.
        samples: Items used, at most: the first ones.
        tokens_per_step: Tokens filled at a decoding step, the most confident first.
        length: Tokens of an answer; none = the task's own, or all that fit.
        name: Of its curves, evaluation/NAME/accuracy; none = the task.
    """

    task: Literal["sudoku", "gsm8k-program", "gsm8k-number", "exact"]
    data: str
    interval: int = 1000
    samples: int = 256
    tokens_per_step: int = 1
    length: int | None = None
    name: str | None = None

    @property
    def curve(self) -> str:
        """What the curves are called."""
        return f"evaluation/{self.name or self.task}"


@dataclass
class EvaluationConfig:
    """What is measured during training.

    Args:
        interval: Steps between two measurements of the held-out loss; 0 = none.
        samples: Validation examples used for it, at most; always the same ones under the same masks.
        bound_draws: Also estimate the bound on the negative log-likelihood of these examples, with so many
            masks of each (an even number), which takes as many forwards. 0 = none.
        tasks: Tasks whose accuracy is measured, such as [{task: sudoku, data: held_out.jsonl}].
    """

    interval: int = 500
    samples: int = 512
    bound_draws: int = 0
    tasks: list[TaskConfig] = field(default_factory=list)

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require(self.interval >= 0, f"evaluation.interval is {self.interval}: it must be 0 or more.")
        require_positive("evaluation", self, "samples")
        require(
            self.bound_draws >= 0 and self.bound_draws % 2 == 0,
            f"evaluation.bound_draws is {self.bound_draws}: give an even number, the standard error needs "
            "pairs; or 0 for none.",
        )
        curves: set[str] = set()
        for number, task in enumerate(self.tasks):
            keys = ("interval", "samples", "tokens_per_step", "length")
            require_positive(f"evaluation.tasks[{number}]", task, *keys)
            require(
                task.curve not in curves,
                f"evaluation.tasks[{number}].name is {task.name}, but there are curves {task.curve} already: "
                "give each task a name of its own.",
            )
            curves.add(task.curve)


@dataclass
class ProfilingConfig:
    """What DeepSpeed measures about the first steps of a start of the program.

    Args:
        flops_step: The step, counted from the start of the program, whose first forward is measured module
            by module on the first rank; 0 = none. The report is RUN_DIR/flops_profile.txt.
        communication_steps: How many steps have their collectives timed, counted from the start; 0 = none.
            Those steps wait for the device at every collective. The table is RUN_DIR/communication.txt.
    """

    flops_step: int = 0
    communication_steps: int = 0

    def check(self, engine: EngineConfig) -> None:
        """Raise a `UserError` for the first setting that cannot work with the engine."""
        for key in ("flops_step", "communication_steps"):
            value = getattr(self, key)
            require(value >= 0, f"profiling.{key} is {value}: it must be 0 or more.")
            require(
                value == 0 or engine.kind == "deepspeed",
                f"profiling.{key} is {value}, but engine.kind is {engine.kind!r}: DeepSpeed measures it, set "
                "engine.kind to 'deepspeed'.",
            )
        require(
            self.flops_step == 0 or not engine.compile,
            f"profiling.flops_step is {self.flops_step}, but engine.compile is true: the modules inside a "
            "compiled block cannot be measured. Set one of them to 0 or false.",
        )
