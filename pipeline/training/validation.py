"""The evaluations of a run on its validation examples, when they are due."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import Config
from pipeline.data.examples import ExampleDataset
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.protocol import Engine
from pipeline.objectives.objective import ObjectiveSchedule
from pipeline.training.held_out import held_out_bound, held_out_loss
from pipeline.training.shown_texts import write_texts
from pipeline.training.state import TrainState
from pipeline.training.step_log import StepLog


class Validation:
    """Held-out loss and bound, and texts that the model writes, every ``evaluation.interval`` steps."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        valid: ExampleDataset | None,
        objectives: ObjectiveSchedule,
        tokenizer: Tokenizer,
        state: TrainState,
        log: StepLog,
        stopped: Callable[[], bool],
    ) -> None:
        """Take what an evaluation needs.

        Args:
            config: the run.
            engine: what runs the model.
            valid: validation examples, where there are any.
            objectives: the objective of each step.
            tokenizer: of the model.
            state: of the run.
            log: where the figures are written.
            stopped: asked before every forward whether to give up; all ranks must answer alike.
        """
        self.config = config
        self.engine = engine
        self.valid = valid
        self.objectives = objectives
        self.tokenizer = tokenizer
        self.state = state
        self.log = log
        self.stopped = stopped

    def after_step(self) -> None:
        """Measure, if it is due; with the averaged weights too, where they are kept.

        A stop cuts it short. The resumed run calls this again before its first step.
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
            facts = ", ".join(f"{name} {loss:.4f}" for name, loss in measured.items())
            self.log.progress.say(f"step {step}: {facts} nats a masked token")

    def _measure(self, valid: ExampleDataset, prefix: str = "") -> dict[str, float | None]:
        """Return loss and bound by the present weights; nothing after a stop."""
        settings, batch_size, step = (
            self.config.evaluation,
            self.config.train.micro_batch_size,
            self.state.step,
        )
        common = self.engine, valid, settings.samples, batch_size
        objective = self.objectives.at(step)
        found = {"loss": held_out_loss(*common, objective.held_out(), step, self.stopped)}
        if settings.bound_draws:
            draws = settings.bound_draws
            found["bound"] = held_out_bound(*common, objective.layout, step, draws, self.stopped)
        return {f"held_out/{prefix}{name}": value for name, value in found.items()}

    def _write_texts(self, valid: ExampleDataset) -> None:
        """Write what the model puts in the place of some validation examples; nothing after a stop."""
        count, step = min(self.config.monitor.texts, len(valid)), self.state.step
        layout = self.objectives.at(step).layout
        texts = write_texts(self.engine, valid, count, layout, self.tokenizer, step, self.stopped)
        self.log.recorder.write_texts(texts)
