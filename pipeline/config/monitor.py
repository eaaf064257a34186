"""Settings of what is shown and recorded while a run lasts."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.checks import require


@dataclass
class MonitorConfig:
    """Curves beyond TensorBoard and metrics.jsonl, which every run writes.

    Args:
        texts: Validation examples whose answer, or second half, the model writes at each evaluation, shown in
            the order of unmasking. 0 = none.
        wandb: Also send the curves to Weights & Biases (pip install wandb).
        wandb_project: Project of the run there; its name is that of the run folder.
    """

    texts: int = 2
    wandb: bool = False
    wandb_project: str = "puma"

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require(self.texts >= 0, f"monitor.texts is {self.texts}: it must be 0 or more.")
        require(bool(self.wandb_project), "monitor.wandb_project is empty: give it a name.")
