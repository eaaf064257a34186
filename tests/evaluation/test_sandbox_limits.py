"""Programs that exceed the limits of the sandbox."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from pipeline.evaluation.sandbox import Limits, Outcome, Sandbox
from support.sandboxes import TRY, Watch, said, started

pytestmark = pytest.mark.slow


def test_fork_bomb(box: Sandbox) -> None:
    forks = "[os.fork, os.forkpty, lambda: os.posix_spawn('/bin/true', ['true'], {})]"
    seen = Watch(box, f"{TRY}\nend = time.time() + 0.4\nwhile time.time() < end: attempt(*{forks})")
    assert (seen.processes, seen.left) == (1, [])


def test_thread_bomb(box: Sandbox) -> None:
    start = "lambda: _thread.start_new_thread(time.sleep, (1,))"
    seen = Watch(
        box, f"{TRY}\nimport _thread\nend = time.time() + 0.4\nwhile time.time() < end: attempt({start})"
    )
    assert (seen.processes, seen.threads) == (1, 1)


@pytest.mark.parametrize(
    ("program", "least"),
    [
        ("while True: pass", 0.9),
        ("import time\nwhile True: time.sleep(99)", 1.1),
        ("import os\nos.close(3)\nwhile True: pass", 0.9),
        ("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
         "    except BaseException: pass\nwhile True:\n    try:\n        while True: pass\n"
         "    except BaseException: pass", 0.9),
    ],
    ids=["infinite loop", "sleep for ever", "closed result", "signals ignored"],
)  # fmt: skip
def test_programs_without_end(program: str, least: float) -> None:
    with started("this", Limits(cpu_seconds=1, wall_seconds=1.2)) as box:
        began = time.monotonic()
        outcome = box.run(program)
        assert least < time.monotonic() - began < 4
        assert outcome in (
            Outcome(error="ended by SIGKILL"),
            Outcome(error="still running after 1.2 s"),
        )
        assert psutil.Process(box.servers[0].pid).children() == []
        assert box.run("def f(): return 1") == Outcome(value="1")


def test_memory(box: Sandbox) -> None:
    hoard = "held = []\ndef solution():\n    try:\n        while True: held.append(bytearray(2**22))"
    seen = Watch(
        box, f"{hoard}\n    except MemoryError:\n        import time; time.sleep(0.3); return len(held)"
    )
    assert int(said(seen.outcome)) > 20
    assert 2**26 < seen.memory < 2**28 + 2**26


def test_output_goes_nowhere(box: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    flood = "for fd in (0, 1, 2): attempt(lambda: os.write(fd, b'x' * 2**20))"
    box.run(f"{TRY}\nfor i in range(200):\n    print('x' * 2**20); {flood}")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "program", ["import os\nwhile True: os.write(3, b'x' * 2**20)", "def f(): return 'x' * 2**24"]
)
def test_large_results_are_cut_off(box: Sandbox, program: str) -> None:
    outcome = box.run(program)
    assert outcome.value is None
    assert len(outcome.error or "") < 250


def test_large_files(box: Sandbox, tmp_path: Path) -> None:
    names = [f"{folder}/sandbox-large-{os.getpid()}" for folder in (tmp_path, "/tmp", "/dev/shm", ".")]
    writes = ", ".join(f"lambda: open('{name}', 'wb').write(bytes(2**26))" for name in names)
    seen = Watch(box, f"{TRY}\nattempt({writes}, lambda: os.write(os.memfd_create('a'), bytes(2**26)))")
    said(seen.outcome)
    assert not any(Path(name).exists() for name in names)
