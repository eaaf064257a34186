"""One run on one folder: a second one would take the first one's checkpoints for its own."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pipeline.base.errors import UserError

FILE = "run.lock"
HEARTBEAT = 10.0  # seconds between two signs of life
SILENCE = 35.0  # seconds without one after which a holder on another host counts as dead


class RunLock:
    """A lock on a run folder, held by the first rank of a run.

    On one host the kernel's own lock (flock) decides: it goes away with the process, however that ends.
    Between hosts not every file system passes it on, so the holder also renews the file's time, and who finds
    the file of a run on another host watches it for a while before taking it over.
    """

    def __init__(self, run_dir: Path) -> None:
        """Take the lock.

        Raises:
            UserError: when another run holds it, or the folder cannot be written.
        """
        self.path = run_dir / FILE
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"run_dir: {self.path} cannot be written ({error.strerror}): make {run_dir} writable, or "
                "give another run_dir."
            ) from None
        try:
            self._take()
        except BaseException:
            os.close(self.descriptor)
            raise
        self.released = threading.Event()
        self.heart = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.heart.start()

    def _take(self) -> None:
        kernel_decides = True
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(self._refusal(self._owner())) from None
        except OSError:  # this file system has no locks
            kernel_decides = False
        owner = self._owner()
        here = owner.get("host") == socket.gethostname()
        if owner and not (here and kernel_decides):
            self._watch(owner)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(facts).encode(), 0)

    def _owner(self) -> dict[str, Any]:
        """Return who wrote the file; nothing when it was released or never held."""
        with suppress(OSError, ValueError):
            owner = json.loads(os.pread(self.descriptor, 4096, 0))
            if isinstance(owner, dict):
                return owner
        return {}

    def _refusal(self, owner: dict[str, Any]) -> str:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('started', '?')}"
        return f"{self.path.parent} is in use by another run ({who}): stop that one, or give another run_dir."

    def _watch(self, owner: dict[str, Any]) -> None:
        """Return when the holder shows no sign of life for a while; clocks of hosts are not compared."""
        print(
            f"{self.path} is that of process {owner.get('pid')} on {owner.get('host')}: waiting "
            f"{SILENCE:.0f} s for a sign of life",
            flush=True,
        )
        last, deadline = self._sign(), time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENCE / 10))
            if self._sign() != last:
                raise UserError(self._refusal(self._owner()))
        print(f"{self.path} is stale: its run is dead, taking it over", flush=True)

    def _sign(self) -> tuple[int, bytes]:
        """Return what a living holder changes; the file is opened anew, as network file systems cache."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.fstat(descriptor).st_mtime_ns, os.pread(descriptor, 4096, 0)
        finally:
            os.close(descriptor)

    def _beat(self) -> None:
        while not self.released.wait(HEARTBEAT):
            with suppress(OSError):  # a full or absent file system is for the next save to report
                os.utime(self.descriptor)

    def release(self) -> None:
        """Let another run take the folder."""
        self.released.set()
        self.heart.join()
        with suppress(OSError):
            os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)
