"""Progress display: a bar on a tty, plain lines in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

MEGABYTE = 1e6  # bytes
REPORT_SECONDS = 10  # between two reports of a tool


class Progress:
    """Progress of a long task, with rate and time left."""

    def __init__(self, total: float | None, done: float, unit: str, enabled: bool = True) -> None:
        """Start at `done` of `total` units (None: unknown); show nothing unless `enabled` (rank 0)."""
        self.total = total
        self.first = self.done = done
        self.unit = unit
        self.enabled = enabled
        self.started = time.monotonic()
        on_tty = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True) if on_tty else None

    def advance(self, done: float) -> None:
        """Set the total number of finished units to `done`."""
        if self.bar is not None:
            self.bar.update(done - self.done)
        self.done = done

    def report(self, facts: str) -> None:
        """Show `facts` next to the bar, or print them with rate and time left."""
        if self.bar is not None:
            self.bar.set_postfix_str(facts)
        elif self.enabled:
            rate = (self.done - self.first) / max(1e-9, time.monotonic() - self.started)
            of_all = to_go = ""
            if self.total is not None:
                left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
                of_all, to_go = f"/{self.total}", f"  {left} left"
            print(f"{self.unit} {self.done}{of_all}  {facts}  {rate:.2f} {self.unit}/s{to_go}", flush=True)

    def say(self, message: str) -> None:
        """Print a message above the bar."""
        if self.enabled:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


class ReadingProgress:
    """Progress of reading large files, on stderr: a bar on a terminal, plain lines in a log.

    Nothing is shown of what takes a moment. Standard output stays free for results.
    """

    def __init__(self, what: str, total: int, enabled: bool = True) -> None:
        """Start at 0 of `total` bytes; show nothing unless `enabled`."""
        self.what, self.total, self.done = what, total, 0
        self.shown = time.monotonic()
        self.enabled, on_tty = enabled, enabled and sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, leave=False, delay=1)
            if on_tty
            else None
        )

    def advance(self, count: int) -> None:
        """Add `count` bytes."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.shown >= REPORT_SECONDS:
            self.shown = time.monotonic()
            done, total = (tqdm.format_sizeof(size, "B") for size in (self.done, self.total))
            print(f"{self.what}: {done} of {total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def still(what: str) -> Iterator[None]:
    """Say every few seconds that `what` is still being done, for a library that reports nothing itself."""
    done, started = threading.Event(), time.monotonic()

    def say() -> None:
        while not done.wait(REPORT_SECONDS):
            tqdm.write(f"{what}: {time.monotonic() - started:.0f} s so far", file=sys.stdout)
            sys.stdout.flush()

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
