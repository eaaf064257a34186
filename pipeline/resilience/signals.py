"""Signals that ask a run to stop: SIGUSR1 (a batch system's warning), SIGTERM (preemption), SIGINT (Ctrl+C).

The first one lets the step end; then the run is saved and ends with EXIT_REQUEUE. The next one ends it at
once.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from pipeline.cli import EXIT_INTERRUPTED

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# One request may arrive several times: by the process group, and forwarded by the launcher.
REPEATS_WITHIN = 3.0  # seconds


class StopSignals:
    """Notes a request to stop; nothing is interrupted.

    Attributes:
        received: whether this process was asked to stop.
    """

    def __init__(self) -> None:
        """Take over the signals until `close`."""
        self.received = False
        self._first = 0.0
        self._before: dict[int, Any] = {each: signal.signal(each, self._receive) for each in SIGNALS}

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
            self._say(f"{signal.Signals(number).name}: stopping after this step; once more ends it at once")
        elif now - self._first > REPEATS_WITHIN:
            self._say(f"{signal.Signals(number).name} again: ending at once, nothing is saved")
            os._exit(EXIT_INTERRUPTED)

    def _say(self, message: str) -> None:
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{message}\n".encode())

    def ignore(self) -> None:
        """Let no signal change the exit code of a process that is ending.

        Launchers end the other ranks by a signal when the first one has left with another code than 0.
        """
        self._before = {}
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)

    def close(self) -> None:
        """Give the signals back, unless they are ignored by now."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
