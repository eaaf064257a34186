"""Evaluations on the validation examples during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.data.examples import ExampleDataset
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.protocol import Engine
from pipeline.objectives.seam import ObjectiveSchedule
from pipeline.training.held_out import held_out_bound, held_out_loss
from pipeline.training.shown_texts import write_texts
from pipeline.training.state import TrainState
from pipeline.training.step_log import StepLog


@dataclass(eq=False)
class Validation:
    """Measures loss and bound, and lets the model write texts, every ``evaluation.interval`` steps."""

    config: Config
    engine: Engine
    valid: ExampleDataset | None
    objectives: ObjectiveSchedule
    tokenizer: Tokenizer
    state: TrainState
    log: StepLog
    stopped: Callable[[], bool]  # asked before every forward; all ranks must agree

    def after_step(self) -> None:
        """Evaluate if it is due, also with the averaged weights if the run keeps them.

        A stop cuts it short; the resumed run calls this again before its first step.
        """
        step, recorder = self.state.step, self.log.recorder
        written = self.state.held_out_loss is not None or "held_out/loss" in recorder.written_at(step)
        if self.valid is None or written or not self.state.due(self.config.evaluation.interval):
            return
        with recorder.apart(step, "evaluation"):
            losses = self._measure(self.valid)
            if self.config.optimizer.ema_decay is not None:
                with self.engine.averaged_weights():
                    losses |= self._measure(self.valid, "ema_")
            self._write_texts(self.valid)
        measured = {name: loss for name, loss in losses.items() if loss is not None}
        if len(measured) == len(losses):
            self.state.held_out_loss = measured.get("held_out/ema_loss", measured["held_out/loss"])
            recorder.write(step, measured)
            shown = {name: loss for name, loss in measured.items() if name.startswith("held_out/")}
            facts = ", ".join(f"{name} {loss:.4f}" for name, loss in shown.items())
            self.log.progress.say(f"step {step}: {facts} nats a masked token")

    def _measure(self, valid: ExampleDataset, prefix: str = "") -> dict[str, float | None]:
        """Return losses and bound with the current weights; None after a stop."""
        settings, step = self.config.evaluation, self.state.step
        batch_size, layout = self.config.train.micro_batch_size, self.objectives.at(step).layout
        common = self.engine, valid, settings.samples, batch_size, layout, step
        found = held_out_loss(*common, self.stopped, self.config.data.sources)
        measured = {f"held_out/{prefix}loss": None if found is None else found.loss}
        if settings.bound_draws:
            measured[f"held_out/{prefix}bound"] = held_out_bound(*common, settings.bound_draws, self.stopped)
        if found is not None:
            measured |= {f"held_out_by_source/{prefix}{name}": x for name, x in found.by_source.items()}
        return measured

    def _write_texts(self, valid: ExampleDataset) -> None:
        """Let the model rewrite some validation examples; write nothing after a stop."""
        count, step = min(self.config.monitor.texts, len(valid)), self.state.step
        layout = self.objectives.at(step).layout
        texts = write_texts(self.engine, valid, count, layout, self.tokenizer, step, self.stopped)
        self.log.recorder.write_texts(texts)
