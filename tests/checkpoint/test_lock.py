"""The lock of a run folder, after runs that ended, were killed or run on another host."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.base.errors import UserError
from pipeline.checkpoint import lock
from pipeline.checkpoint.lock import RunLock
from support.programs import Outcome

pytestmark = pytest.mark.slow

Train = Callable[..., Outcome]


def hold(folder: str, ready: object) -> None:
    """Hold the lock until killed."""
    RunLock(Path(folder))
    ready.set()  # type: ignore[attr-defined]
    time.sleep(600)


def test_a_second_run_is_refused_in_one_line(train: Train, tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    complaint = train(tmp_path).complaint()
    for part in (str(tmp_path), f"process {os.getpid()}", socket.gethostname(), "run_dir"):
        assert part in complaint
    held.release()
    assert train(tmp_path, "--train.steps", "2").code == 0


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    """The kernel drops the lock with the process, so the next start does not wait."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(300)
    with pytest.raises(UserError, match=f"process {process.pid}"):
        RunLock(tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - started < lock.HEARTBEAT


def write_lock(folder: Path, host: str) -> Path:
    """Write the lock file of a run on another host, without a kernel lock."""
    path = folder / lock.FILE
    path.write_text(json.dumps({"host": host, "pid": 7, "started": "2026-01-01"}))
    return path


def test_a_living_run_on_another_host_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SILENCE", 20.0)
    path = write_lock(tmp_path, "elsewhere")
    heart = threading.Timer(0.5, lambda: os.utime(path))
    heart.start()
    with pytest.raises(UserError, match=r"in use by another run \(process 7 on elsewhere"):
        RunLock(tmp_path)


def test_a_dead_run_on_another_host_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    path = write_lock(tmp_path, "elsewhere")
    held = RunLock(tmp_path)
    assert "is stale" in capsys.readouterr().out
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.release()


def test_the_lock_file_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other hosts watch the modification time."""
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    held = RunLock(tmp_path)
    os.utime(tmp_path / lock.FILE, (0, 0))
    deadline = time.monotonic() + 20
    while (tmp_path / lock.FILE).stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / lock.FILE).stat().st_mtime > 0
    held.release()


@pytest.mark.parametrize("content", ["", "[]", "{half"])
def test_a_lock_file_without_an_owner_is_free(tmp_path: Path, content: str) -> None:
    (tmp_path / lock.FILE).write_text(content)
    RunLock(tmp_path).release()
