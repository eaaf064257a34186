"""The watchdog: a rank that hangs writes its stacks and exits.

When one rank hangs, all others wait for it in a collective. Every rank has a watchdog thread, so all ranks
report, exit and free their GPUs, and the same command can resume on other nodes.
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
_REPORT_WITHIN = 60  # seconds; the process exits if the report itself hangs
_REMEMBERED = 100  # durations kept per phase
_WAITING = ("save", "rollback")  # mostly short, but may wait for a save in progress


class Watchdog:
    """Time the phases of the main thread; exit the process when a phase takes far longer than before."""

    def __init__(self, config: WatchdogConfig, run_dir: Path, rank: int, enabled: bool = True) -> None:
        """Create the watchdog; it starts at the first `enter`.

        Args:
            config: the limits.
            run_dir: the run folder, for the reports.
            rank: rank of this process.
            enabled: whether to watch; disable it in a debugger.
        """
        self.enabled = enabled and config.factor > 0
        self.config = config
        self.folder = run_dir / FOLDER
        self.rank = rank
        self.main = threading.get_ident()
        self.durations: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self.current: tuple[str, float, float] | None = None  # phase, since, limit: replaced atomically
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str) -> None:
        """End the current phase and begin `phase`."""
        now = time.monotonic()
        if self.current is not None:
            last, since, _ = self.current
            self.durations[last].append(now - since)
        self.current = (phase, now, self.limit(phase))
        if self.enabled and not self._thread.ident:
            self._thread.start()

    def limit(self, phase: str) -> float:
        """Return the time limit of a phase in seconds."""
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
        """Print a summary to stderr; write the stacks of all threads and NCCL's trace to the run folder."""
        faulthandler.dump_traceback_later(_REPORT_WITHIN, exit=True)
        path = self.folder / f"rank_{self.rank:05d}.txt"
        headline = (
            f"rank {self.rank}: {phase} has taken {elapsed:.0f} s, the limit is {limit:.0f} s; the rank is "
            f"{self._whereabouts()}. Exiting with code {EXIT_REQUEUE}: rerun the same command to resume. "
            f"Stacks: {path}"
        )
        print(headline, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # the file system may be the cause
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {headline}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
                trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                path.with_suffix(".nccl.pickle").write_bytes(trace)

    def _whereabouts(self) -> str:
        """Return the pipeline function, and the collective, that the main thread is in."""
        ours = collective = ""
        frame = sys._current_frames().get(self.main)
        while frame is not None:  # innermost first
            module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
            if not ours and (module.startswith("pipeline.") or module == "__main__"):
                ours = f"{module}.{name}, line {frame.f_lineno}"
            if not ours and module.startswith(("torch.distributed.", "deepspeed.comm.")):
                collective = name  # the outermost one wins: the collective that was called
            frame = frame.f_back
        return f"in {ours or 'no pipeline function'}" + (f", waiting in {collective}" if collective else "")
