"""Settings of what happens between the steps: checkpoints, evaluation, profiles."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.checks import require, require_positive


@dataclass
class CheckpointConfig:
    """When the run is saved.

    Args:
        interval: Steps between two checkpoints; the last step is always saved.
        keep: Newest checkpoints that are kept.
    """

    interval: int = 1000
    keep: int = 2

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("checkpoint", self, "interval", "keep")


@dataclass
class EvaluationConfig:
    """Held-out loss during training.

    Args:
        interval: Steps between two evaluations; 0 = none.
        samples: Validation samples used, at most; always the same ones under the same masks.
    """

    interval: int = 500
    samples: int = 512

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require(self.interval >= 0, f"evaluation.interval is {self.interval}: it must be 0 or more.")
        require_positive("evaluation", self, "samples")


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

    def check(self, engine_kind: str) -> None:
        """Raise a `UserError` for the first setting that cannot work with an engine of `engine_kind`."""
        for key in ("flops_step", "communication_steps"):
            value = getattr(self, key)
            require(value >= 0, f"profiling.{key} is {value}: it must be 0 or more.")
            require(
                value == 0 or engine_kind == "deepspeed",
                f"profiling.{key} is {value}, but engine.kind is {engine_kind!r}: DeepSpeed measures it, set "
                "engine.kind to 'deepspeed'.",
            )
