"""Evaluations on the validation examples during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """Measures loss and bound, and lets the model write texts, every ``evaluation.interval`` steps.

    Attributes:
        valid: validation examples of the first phase's datasets, then of those that later phases add; empty
            without any.
        mixes: the share of each source in each phase, with any sum; empty with a single phase.
    """

    config: Config
    engine: Engine
    valid: Sequence[ExampleDataset]
    mixes: Sequence[Mapping[str, float]]
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
        if not self.valid or written or not self.state.due(self.config.evaluation.interval):
            return
        with recorder.apart(step, "evaluation"):
            losses = self._measure()
            if self.config.optimizer.ema_decay is not None:
                with self.engine.averaged_weights():
                    losses |= self._measure("ema_")
            self._write_texts(self.valid[0])
        measured = {name: loss for name, loss in losses.items() if loss is not None}
        if len(measured) == len(losses):
            self.state.held_out_loss = measured.get("held_out/ema_loss", measured["held_out/loss"])
            recorder.write(step, measured)
            shown = {name: loss for name, loss in measured.items() if name.startswith("held_out/")}
            facts = ", ".join(f"{name} {loss:.4f}" for name, loss in shown.items())
            self.log.progress.say(f"step {step}: {facts} nats a masked token")

    def _measure(self, prefix: str = "") -> dict[str, float | None]:
        """Return losses and bound with the current weights; None after a stop."""
        settings, step = self.config.evaluation, self.state.step
        batch_size, layout = self.config.train.micro_batch_size, self.objectives.at(step).layout
        common = settings.samples, batch_size, layout, step
        found = []
        for valid in self.valid:
            losses = held_out_loss(self.engine, valid, *common, self.stopped, self.config.data.sources)
            if losses is None:
                return {f"held_out/{prefix}loss": None}
            found.append(losses)
        measured: dict[str, float | None] = {f"held_out/{prefix}loss": found[0].loss}
        if settings.bound_draws:
            draws = settings.bound_draws
            bound = held_out_bound(self.engine, self.valid[0], *common, draws, self.stopped)
            measured[f"held_out/{prefix}bound"] = bound
        by_source = {name: loss for losses in found for name, loss in losses.by_source.items()}
        measured |= {f"held_out_by_source/{prefix}{name}": loss for name, loss in by_source.items()}
        for phase, mix in enumerate(self.mixes):
            known = {name: share for name, share in mix.items() if name in by_source}
            if known:
                loss = sum(by_source[name] * share for name, share in known.items()) / sum(known.values())
                measured[f"held_out_by_phase/{prefix}{phase}"] = loss
        return measured

    def _write_texts(self, valid: ExampleDataset) -> None:
        """Let the model rewrite some validation examples; write nothing after a stop."""
        count, step = min(self.config.monitor.texts, len(valid)), self.state.step
        layout = self.objectives.at(step).layout
        texts = write_texts(self.engine, valid, count, layout, self.tokenizer, step, self.stopped)
        self.log.recorder.write_texts(texts)
