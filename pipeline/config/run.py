"""Checkpoint, evaluation and profiling settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.checks import require, require_not_negative, require_positive
from pipeline.config.training import EngineConfig


@dataclass
class CheckpointConfig:
    """Checkpoints.

    Args:
        interval: Steps between two checkpoints; the last step is always saved.
        asynchronous: Write in the background from a copy in host memory; false = training waits until the
            checkpoint is on disk.
        keep: Number of newest checkpoints to keep.
        keep_every: Also keep, forever, every checkpoint whose step is a multiple of this; 0 = none.
        keep_best: Also keep this many checkpoints with the lowest held-out loss; requires an evaluation at
            every saved step. 0 = none.
        max_failed_saves: Stop after this many failed saves in a row (disk full, permission lost).
        verify_hashes: Before resuming, read every checkpoint file and compare its hash, and before a start
            those of train.initial_weights; false = compare sizes only.
    """

    interval: int = 1000
    asynchronous: bool = True
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    max_failed_saves: int = 3
    verify_hashes: bool = True

    def check(self, evaluation_interval: int) -> None:
        """Raise a `UserError` for the first setting that is invalid or conflicts with evaluation.interval."""
        require_positive("checkpoint", self, "interval", "keep", "max_failed_saves")
        require_not_negative("checkpoint", self, "keep_every", "keep_best")
        require(
            self.keep_every % self.interval == 0,
            f"checkpoint.keep_every is {self.keep_every}: it must be a multiple of checkpoint.interval = "
            f"{self.interval}, because only those steps are saved.",
        )
        require(
            self.keep_best == 0 or (evaluation_interval > 0 and self.interval % evaluation_interval == 0),
            f"checkpoint.keep_best is {self.keep_best}, but checkpoint.interval = {self.interval} is "
            f"not a multiple of evaluation.interval = {evaluation_interval}: make it one, so that every "
            "saved step has a held-out loss.",
        )


@dataclass
class TaskConfig:
    """A task of `tools/evaluate.py` to evaluate during training.

    Args:
        task: How answers are scored; generative-perplexity = by a causal model, as text.
        data: File of items: question and answer for GSM8K, prompt and answer for the other tasks.
            For generative-perplexity also texts (text_key), or the PREFIX of a dataset.
        interval: Steps between two evaluations; the last step is always evaluated.
        samples: Maximum number of items; the first ones in the file are used.
        tokens_per_step: Tokens unmasked per decoding step, most confident first.
        length: Answer length in tokens; null = the task's default, or all that fit.
        name: Name of the curves, evaluation/NAME/accuracy; null = the task's name.
        scorer: For generative-perplexity, a causal model in the format of transformers, or an autoregressive
            run (RUN or RUN:STEP). Each rank loads it for a measurement and frees it afterwards.
        text_key: For generative-perplexity, the key of the texts, if data has no pairs.
        prefix_length: For generative-perplexity, tokens of a text that the model is given.
    """

    task: Literal["sudoku", "gsm8k-program", "gsm8k-number", "exact", "generative-perplexity"]
    data: str
    interval: int = 1000
    samples: int = 256
    tokens_per_step: int = 1
    length: int | None = None
    name: str | None = None
    scorer: str | None = None
    text_key: str | None = None
    prefix_length: int = 0

    @property
    def samples_text(self) -> bool:
        """Whether the task scores samples of text; the others know right answers."""
        return self.task == "generative-perplexity"

    @property
    def curve(self) -> str:
        """The tag prefix of its curves."""
        return f"evaluation/{self.name or self.task}"


@dataclass
class EvaluationConfig:
    """Evaluation during training.

    Args:
        interval: Steps between two measurements of the held-out loss; 0 = none.
        samples: Maximum number of validation examples for the held-out loss, and as many again for the
            datasets that each later phase of the data adds; examples and masks are the same every time.
        bound_draws: Also estimate the NLL bound of the examples of data.prefixes with this many masks per
            example (an even number), at the cost of as many forward passes. 0 = none.
        tasks: Tasks to measure, such as [{task: sudoku, data: held_out.jsonl}].
    """

    interval: int = 500
    samples: int = 512
    bound_draws: int = 0
    tasks: list[TaskConfig] = field(default_factory=list)

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        require_not_negative("evaluation", self, "interval")
        require_positive("evaluation", self, "samples")
        require(
            self.bound_draws >= 0 and self.bound_draws % 2 == 0,
            f"evaluation.bound_draws is {self.bound_draws}: the standard error needs pairs of masks; give an "
            "even number, or 0 for none.",
        )
        curves: set[str] = set()
        for number, task in enumerate(self.tasks):
            keys = ("interval", "samples", "tokens_per_step", "length")
            require_positive(f"evaluation.tasks[{number}]", task, *keys)
            require_not_negative(f"evaluation.tasks[{number}]", task, "prefix_length")
            require(
                not task.samples_text or task.scorer is not None,
                f"evaluation.tasks[{number}].scorer is missing: task {task.task} needs a causal model that "
                "scores the samples.",
            )
            for key in ("scorer", "text_key", "prefix_length"):
                require(
                    task.samples_text or not getattr(task, key),
                    f"evaluation.tasks[{number}].{key} is {getattr(task, key)}: it has no effect with task "
                    f"{task.task}, leave it out.",
                )
            require(
                task.curve not in curves,
                f"evaluation.tasks[{number}].name is {task.name}, but another task already has the curve "
                f"{task.curve}: give each task its own name.",
            )
            curves.add(task.curve)


@dataclass
class ProfilingConfig:
    """Profiles of single steps, counted from the start of the program, and of memory; all are off by default.

    Args:
        flops_step: Profile the first forward pass of this step, module by module, on rank 0. The report is
            RUN_DIR/flops_profile.txt. 0 = off.
        communication_steps: Time the collectives of the first steps, this many; each collective then waits
            for the device. The table is RUN_DIR/communication.txt. 0 = off.
        trace_steps: First and last step of a Chrome trace of each rank, such as [10, 12], in RUN_DIR/traces.
            No throughput figure counts these steps. null = off.
        memory_snapshot: When a GPU runs out of memory, write what is in it to RUN_DIR/traces, with the Python
            stack that allocated each block. Every allocation of the run then notes its stack.
    """

    flops_step: int = 0
    communication_steps: int = 0
    trace_steps: list[int] | None = None
    memory_snapshot: bool = False

    def check(self, engine: EngineConfig, steps: int) -> None:
        """Raise a `UserError` for the first setting that is invalid or conflicts with the engine's.

        Args:
            engine: of the run.
            steps: of the run.
        """
        require_not_negative("profiling", self, "flops_step", "communication_steps")
        for key in ("flops_step", "communication_steps"):
            value = getattr(self, key)
            require(
                value == 0 or engine.kind == "deepspeed",
                f"profiling.{key} is {value}, but engine.kind is {engine.kind!r}: only DeepSpeed measures "
                "it; set engine.kind to 'deepspeed'.",
            )
        for key in ("compile", "compile_functions"):
            require(
                self.flops_step == 0 or not getattr(engine, key),
                f"profiling.flops_step is {self.flops_step}, but engine.{key} is true: what is compiled "
                f"cannot be profiled. Set profiling.flops_step to 0 or engine.{key} to false.",
            )
        traced = self.trace_steps
        require(
            traced is None or (len(traced) == 2 and 2 <= traced[0] <= traced[1] <= steps),
            f"profiling.trace_steps is {traced}: give the first and the last step to trace, from 2 (the step "
            f"before warms the profiler up) to train.steps = {steps}.",
        )
        require(
            not self.memory_snapshot or engine.device != "cpu",
            "profiling.memory_snapshot is true, but engine.device is 'cpu': only the memory of a GPU has "
            "snapshots. Leave it out.",
        )
