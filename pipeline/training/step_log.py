"""Curves, examples and terminal output, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.base.progress import Progress
from pipeline.chains.slots import SlotGroup
from pipeline.monitor.example_log import ExampleLog
from pipeline.monitor.recorder import Recorder
from pipeline.resilience.skipped import SkipLog
from pipeline.training.state import TrainState


@dataclass(eq=False)
class StepLog:
    """Writes curves and the examples of each step, and shows progress on the terminal.

    Attributes:
        state: progress of the run.
        interval: steps between two lines, ``train.log_interval``.
        recorder: writes the curves.
        examples: writes the examples of each step; None unless ``train.log_samples`` is set.
        skipped: log of refused steps.
        progress: the terminal.
    """

    state: TrainState
    interval: int
    recorder: Recorder
    examples: ExampleLog | None
    skipped: SkipLog
    progress: Progress

    def begin_step(self, groups: Sequence[SlotGroup]) -> None:
        """Write the examples of the next step."""
        if self.examples is not None:
            self.examples.write(self.state.step + 1, groups)

    def collect(self, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Remember the figures of the last step, without waiting for the device."""
        self.recorder.collect(self.state.step, loss, gradient_norm, learning_rate)

    def after_step(self) -> None:
        """Show the progress; write and show the figures of the interval when they are due."""
        self.progress.advance(self.state.step)
        if self.state.is_done or self.state.step % self.interval == 0:
            self.flush()

    def flush(self) -> None:
        """Fetch, write and show the figures since the last flush; every rank calls this."""
        if not self.recorder.pending:
            return
        values = self.recorder.flush(self.skipped.skipped(), self.state.tokens)
        rate = values.get("tokens_per_second")  # a trace leaves its steps out
        self.progress.report(
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"masked {values['masked_fraction']:.2f}"
            + (f"  {rate:,.0f} tokens/s" if rate is not None else "")
        )

    def sync(self) -> None:
        """Bring every figure up to this step to the disk, before a checkpoint of the step exists."""
        self.flush()
        self.recorder.sync()
        self.skipped.sync()

    def reopen(self) -> None:
        """Drop what was written beyond the current step, after a rollback."""
        self.recorder.open(self.state.step + 1)
        if self.examples is not None:
            self.examples.open(self.state.step + 1)

    def close(self) -> None:
        """Flush buffers and remove the progress bar."""
        self.progress.close()
        self.recorder.close()
        if self.examples is not None:
            self.examples.close()
