"""Settings of what happens when something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.checks import require, require_positive


@dataclass
class GuardConfig:
    """Updates that would harm the weights are not made.

    Args:
        spike_limit: Also skip a step whose loss or gradient norm lies so many robust standard deviations
            above the median of the last 128 steps; 0 = skip only what is not finite.
        skips_before_rollback: Go back to the last checkpoint after so many skipped steps in a row, without
            the examples that were in them.
        max_rollbacks: Stop when that has happened so many times at one checkpoint.
    """

    spike_limit: float = 50.0
    skips_before_rollback: int = 5
    max_rollbacks: int = 2

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require(self.spike_limit >= 0, f"guard.spike_limit is {self.spike_limit}: it must be 0 or more.")
        require_positive("guard", self, "skips_before_rollback")
        require(
            self.max_rollbacks >= 0, f"guard.max_rollbacks is {self.max_rollbacks}: it must be 0 or more."
        )


@dataclass
class WatchdogConfig:
    """A run in which nothing moves any more says where it stands, and ends with the code to be requeued.

    Args:
        factor: Limit for a step, a batch of an evaluation or a save, as a multiple of the median time it took
            so far in this process; 0 = no watchdog.
        minimum: The limit is never below this, in seconds.
        first: Limit where nothing has been measured yet, in seconds; the first step compiles and reads most.
            Never less for a save, the last of which waits until all is written.
    """

    factor: float = 20.0
    minimum: float = 300.0
    first: float = 1800.0

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require(self.factor >= 0, f"watchdog.factor is {self.factor}: it must be 0 or more.")
        require(
            self.factor == 0 or self.factor > 1,
            f"watchdog.factor is {self.factor}: half of all healthy steps take longer than the median, give "
            "more than 1, such as 20, or 0 for no watchdog.",
        )
        require_positive("watchdog", self, "minimum", "first")
