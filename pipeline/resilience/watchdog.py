"""The watchdog: when nothing moves any more, a rank says where it stands and ends, whatever holds it.

A rank that hangs makes all others wait for it in a collective. Each has a watchdog thread of its own, so all
of them report and leave, none keeps its GPU, and the same command can go on elsewhere.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections import defaultdict, deque
from pathlib import Path
from statistics import median

import torch

from pipeline.base.errors import EXIT_REQUEUE
from pipeline.config import WatchdogConfig

FOLDER = "watchdog"
_REPORT_WITHIN = 60  # seconds; a report that hangs itself is cut off
_REMEMBERED = 100  # durations of each phase
_WAITING = ("save", "rollback")  # mostly short, but the last ones wait for all that is still to be written


class Watchdog:
    """Measures what the main thread does, and ends the process when it takes far longer than before."""

    def __init__(self, config: WatchdogConfig, run_dir: Path, rank: int, enabled: bool = True) -> None:
        """Prepare; nothing is limited before the first `enter`.

        Args:
            config: the limits.
            run_dir: where reports go.
            rank: of this process.
            enabled: whether to watch; a process in a debugger stands still for long, and is well.
        """
        self.enabled = enabled and config.factor > 0
        self.config = config
        self.folder = run_dir / FOLDER
        self.rank = rank
        self.main = threading.get_ident()
        self.durations: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self.current: tuple[str, float, float] | None = None  # phase, since, limit: one value for the thread
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str) -> None:
        """Say that the last phase is over and another one, or the same once more, begins."""
        now = time.monotonic()
        if self.current is not None:
            last, since, _ = self.current
            self.durations[last].append(now - since)
        self.current = (phase, now, self.limit(phase))
        if self.enabled and not self._thread.ident:
            self._thread.start()

    def limit(self, phase: str) -> float:
        """Return how many seconds a phase may take."""
        known = self.durations[phase]
        least = self.config.first if phase in _WAITING or not known else self.config.minimum
        return max(least, self.config.factor * median(known)) if known else least

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.config.minimum / 4)):
            assert self.current is not None
            phase, since, limit = self.current
            elapsed = time.monotonic() - since
            if elapsed > limit:
                try:
                    self._report(phase, elapsed, limit)
                finally:
                    os._exit(EXIT_REQUEUE)

    def _report(self, phase: str, elapsed: float, limit: float) -> None:
        """Write the stacks of all threads, and what NCCL knows, to the run folder and to stderr."""
        faulthandler.dump_traceback_later(_REPORT_WITHIN, exit=True)
        path = self.folder / f"rank_{self.rank:05d}.txt"
        headline = (
            f"rank {self.rank}: no end of {phase} after {elapsed:.0f} s, the limit is {limit:.0f} s. "
            f"It is {self._whereabouts()}. Ending with exit code {EXIT_REQUEUE}: the same command goes on. "
            f"Stacks: {path}"
        )
        print(headline, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # the file system may be what hangs or fails
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {headline}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
                trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                path.with_suffix(".nccl.pickle").write_bytes(trace)

    def _whereabouts(self) -> str:
        """Return the function of ours, and the collective, that the main thread is in."""
        ours = collective = ""
        frame = sys._current_frames().get(self.main)
        while frame is not None:  # from the innermost outwards
            module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
            if not ours and (module.startswith("pipeline.") or module == "__main__"):
                ours = f"{module}.{name}, line {frame.f_lineno}"
            if not ours and module.startswith(("torch.distributed.", "deepspeed.comm.")):
                collective = name  # ends as the outermost: the collective as it was called
            frame = frame.f_back
        return f"in {ours or 'no function of ours'}" + (f", waiting in {collective}" if collective else "")
