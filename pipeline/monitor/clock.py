"""How long the steps of an interval took."""

from __future__ import annotations

import time
from typing import NamedTuple


class Timed(NamedTuple):
    """What a clock measured.

    Attributes:
        steps: that were timed.
        seconds: they took.
    """

    steps: int
    seconds: float


class Clock:
    """Times training steps; leaves out what is no training, and the steps while it is paused."""

    def __init__(self) -> None:
        """Start."""
        self.paused = False
        self.restart()

    def restart(self) -> None:
        """Forget what was measured; a pause lasts."""
        self.steps = 0
        self.since = time.monotonic()
        self.before = 0.0  # seconds up to the pause

    def count(self) -> None:
        """Count a step that has ended."""
        self.steps += not self.paused

    def leave_out(self, seconds: float) -> None:
        """Leave out the last so many seconds, between two steps."""
        self.since += seconds

    def pause(self) -> None:
        """Stop the clock: the steps that follow are slower than others."""
        self.before, self.paused = time.monotonic() - self.since, True

    def resume(self) -> None:
        """Let the clock run again."""
        self.since, self.paused = time.monotonic() - self.before, False

    def take(self) -> Timed:
        """Return what was measured since the last call, and begin anew."""
        seconds = self.before if self.paused else time.monotonic() - self.since
        timed = Timed(self.steps, seconds)
        self.restart()
        return timed
