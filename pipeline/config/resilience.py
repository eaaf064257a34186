"""Fault tolerance settings."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from pipeline.config.checks import require, require_not_negative, require_positive


@dataclass
class GuardConfig:
    """Guard that skips updates which would harm the weights.

    Args:
        spike_limit: Skip a step whose loss or gradient norm exceeds the median of the last 128 steps by this
            many robust standard deviations; 0 = skip only steps with a loss or norm that is not finite.
        skips_before_rollback: Roll back to the newest checkpoint after this many skipped steps in a row, and
            exclude their examples from then on.
        max_rollbacks: Stop with an error instead of rolling back more than this many times to the same
            checkpoint.
    """

    spike_limit: float = 50.0
    skips_before_rollback: int = 5
    max_rollbacks: int = 2

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        require_not_negative("guard", self, "spike_limit", "max_rollbacks")
        require_positive("guard", self, "skips_before_rollback")


@dataclass
class WatchdogConfig:
    """Watchdog that writes the stack traces of a hanging run and exits with the requeue code.

    Args:
        factor: Time limit of a step, an evaluation batch or a save, as a multiple of its median duration so
            far in this process; 0 = no watchdog.
        minimum: Lower bound of the time limit, in seconds.
        first: Time limit before any duration is known, in seconds; the first step compiles and reads the
            most. Also the lower bound for saves, because the last save waits until everything is on disk.
    """

    factor: float = 20.0
    minimum: float = 300.0
    first: float = 1800.0

    @property
    def collective_limit(self) -> timedelta:
        """Longest wait of a rank in a collective: the watchdog ends first, and its report says more."""
        return max(timedelta(minutes=10), timedelta(seconds=self.first + 60))

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        require_not_negative("watchdog", self, "factor")
        require(
            self.factor == 0 or self.factor > 1,
            f"watchdog.factor is {self.factor}: half of all healthy steps take longer than the median; "
            "give more than 1, such as 20, or 0 for no watchdog.",
        )
        require_positive("watchdog", self, "minimum", "first")
