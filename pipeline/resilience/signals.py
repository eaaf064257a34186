"""Signals that ask a run to stop: SIGUSR1 (a batch system's warning), SIGTERM (preemption), SIGINT (Ctrl+C).

The first one lets the step end; then the run is saved and ends with EXIT_REQUEUE. The next one ends it at
once, also when the step never ends: Python calls a handler when its main thread comes back from C code, and
in a collective that hangs it never does. So a thread hears of every signal too (`signal.set_wakeup_fd`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from pipeline.base.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# One request may arrive several times: by the process group, and forwarded by the launcher.
REPEATS_WITHIN = 3.0  # seconds


class StopSignals:
    """Notes a request to stop; nothing is interrupted.

    Attributes:
        received: whether this process was asked to stop.
    """

    def __init__(self) -> None:
        """Take over the signals until `close`; only the main thread may."""
        self.received = False
        self._first: float | None = None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._woken_before = signal.set_wakeup_fd(self._writer)
        self._before: dict[int, Any] = {each: signal.signal(each, self._note) for each in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _note(self, number: int, _: FrameType | None) -> None:
        """Let the main thread know before it does anything else."""
        self.received = True

    def _listen(self) -> None:
        """Receive the number of each signal as a byte; runs in a thread, until the pipe is closed."""
        while content := os.read(self._reader, 1):
            if content[0] in SIGNALS:
                self._receive(signal.Signals(content[0]).name)
        os.close(self._reader)

    def _receive(self, name: str) -> None:
        now = time.monotonic()
        self.received = True
        if self._first is None:
            self._first = now
            self._say(f"{name}: stopping after this step; once more ends it at once")
        elif now - self._first > REPEATS_WITHIN:
            self._say(f"{name} again: ending at once, nothing is saved")
            os._exit(EXIT_INTERRUPTED)

    def _say(self, message: str) -> None:
        # Not print: its lock may be held by whoever hangs.
        with suppress(OSError):
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
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._writer)
        self._thread.join()
