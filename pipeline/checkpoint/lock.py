"""Lock of a run folder: two runs in one folder would overwrite each other's checkpoints."""

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
HEARTBEAT = 10.0  # seconds between heartbeats
SILENCE = 35.0  # seconds without a heartbeat after which a holder on another host counts as dead


class RunLock:
    """A lock on a run folder, held by the first rank of a run.

    On one host the kernel lock (flock) decides; the kernel drops it when the process ends. Not every network
    file system shares flock between hosts, so the holder also touches the file every `HEARTBEAT` seconds. A
    run that finds the lock of another host waits `SILENCE` seconds for a heartbeat before it takes over.
    """

    def __init__(self, run_dir: Path) -> None:
        """Acquire the lock.

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
        except OSError:  # the file system has no locks
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
        """Return the content of the lock file; empty when it was released or never held."""
        with suppress(OSError, ValueError):
            owner = json.loads(os.pread(self.descriptor, 4096, 0))
            if isinstance(owner, dict):
                return owner
        return {}

    def _refusal(self, owner: dict[str, Any]) -> str:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('started', '?')}"
        return f"{self.path.parent} is in use by another run ({who}): stop that one, or give another run_dir."

    def _watch(self, owner: dict[str, Any]) -> None:
        """Return after `SILENCE` seconds without a heartbeat, by this host's clock alone."""
        print(
            f"{self.path} belongs to process {owner.get('pid')} on {owner.get('host')}: waiting "
            f"{SILENCE:.0f} s for a heartbeat",
            flush=True,
        )
        last, deadline = self._sign(), time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENCE / 10))
            if self._sign() != last:
                raise UserError(self._refusal(self._owner()))
        print(f"{self.path} is stale: no heartbeat, taking over", flush=True)

    def _sign(self) -> tuple[int, bytes]:
        """Return what a heartbeat changes; reopen the file, because network file systems cache."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.fstat(descriptor).st_mtime_ns, os.pread(descriptor, 4096, 0)
        finally:
            os.close(descriptor)

    def _beat(self) -> None:
        while not self.released.wait(HEARTBEAT):
            with suppress(OSError):  # the next save reports a full or missing file system
                os.utime(self.descriptor)

    def release(self) -> None:
        """Release the lock."""
        self.released.set()
        self.heart.join()
        with suppress(OSError):
            os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)
