"""Settings of what happens between the steps: checkpoints, evaluation."""

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
