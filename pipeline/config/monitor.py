"""Monitoring settings."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.checks import require, require_not_negative


@dataclass
class MonitorConfig:
    """Monitoring beyond TensorBoard and metrics.jsonl, which every run writes.

    Args:
        texts: Validation examples to complete at each evaluation; the model writes the answer, or the second
            half of packed text, and the log shows the order of unmasking. 0 = off.
        wandb: Also log to Weights & Biases (pip install wandb).
        wandb_project: Weights & Biases project; the run takes the name of the run folder.
    """

    texts: int = 2
    wandb: bool = False
    wandb_project: str = "puma"

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        require_not_negative("monitor", self, "texts")
        require(bool(self.wandb_project), "monitor.wandb_project is empty: give it a name.")
