"""Stop signals: SIGUSR1 (time limit of a batch system), SIGTERM (preemption), SIGINT (Ctrl+C).

After the first signal the run finishes the step, saves and exits with EXIT_REQUEUE. A second signal ends the
process at once, even in a hanging step: Python runs a handler only when the main thread returns from C code,
which a hanging collective never does. So a thread receives every signal, too (`signal.set_wakeup_fd`).
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
# One request may arrive twice: through the process group, and forwarded by the launcher.
REPEATS_WITHIN = 3.0  # seconds


class StopSignals:
    """Record a request to stop, without interrupting the step.

    Attributes:
        received: whether this process was asked to stop.
    """

    def __init__(self) -> None:
        """Install the handlers until `close`; call this from the main thread."""
        self.received = False
        self._first: float | None = None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._woken_before = signal.set_wakeup_fd(self._writer)
        self._before: dict[int, Any] = {each: signal.signal(each, self._note) for each in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _note(self, number: int, _: FrameType | None) -> None:
        """Set `received` before the main thread continues."""
        self.received = True

    def _listen(self) -> None:
        """Read the number of each signal as one byte, until the pipe is closed; runs in a thread."""
        while content := os.read(self._reader, 1):
            if content[0] in SIGNALS:
                self._receive(signal.Signals(content[0]).name)
        os.close(self._reader)

    def _receive(self, name: str) -> None:
        now = time.monotonic()
        self.received = True
        if self._first is None:
            self._first = now
            self._say(f"{name}: stopping after this step; signal again to end at once")
        elif now - self._first > REPEATS_WITHIN:
            self._say(f"{name} again: ending at once without saving")
            os._exit(EXIT_INTERRUPTED)

    def _say(self, message: str) -> None:
        # Not print: the hanging thread may hold its lock.
        with suppress(OSError):
            os.write(2, f"\n{message}\n".encode())

    def ignore(self) -> None:
        """Ignore further signals, so that none changes the exit code of a process that is ending.

        When one rank exits with a non-zero code, launchers signal the others.
        """
        self._before = {}
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)

    def close(self) -> None:
        """Restore the previous handlers, unless `ignore` was called."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._writer)
        self._thread.join()
