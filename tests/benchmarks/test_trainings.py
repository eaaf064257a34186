"""Trainings side by side end with the program that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import trainings
from support.programs import ROOT

pytestmark = pytest.mark.slow

# Each worker starts a training: a process that writes its number and sleeps.
DRIVER = """
import subprocess, sys
from benchmarks import trainings

def work(path):
    program = f"import os, time; open({path!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    subprocess.run([sys.executable, "-c", program], preexec_fn=trainings.end_with_parent())

if __name__ == "__main__":
    list(trainings.side_by_side(work, sys.argv[1:], 2))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_and_trainings_end_with_a_killed_driver(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    paths = [tmp_path / "one", tmp_path / "two"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, str(script), *map(str, paths)], cwd=ROOT, env=environment)
    while not all(path.exists() and path.read_text() for path in paths):
        assert driver.poll() is None
        time.sleep(0.05)
    everyone = psutil.Process(driver.pid).children(recursive=True)
    assert {int(path.read_text()) for path in paths} <= {process.pid for process in everyone}
    driver.send_signal(how)
    driver.wait()
    _, alive = psutil.wait_procs(everyone, timeout=10)
    assert not alive


def fail_at_the_first(path: Path) -> None:
    """A job: leave a trace; the first fails, the others take their time."""
    path.touch()
    if path.name == "0":
        raise ValueError(path)
    time.sleep(0.3)


def test_after_an_error_no_more_jobs_are_begun(tmp_path: Path) -> None:
    jobs = [tmp_path / str(number) for number in range(20)]
    with pytest.raises(ValueError, match=str(jobs[0])):
        list(trainings.side_by_side(fail_at_the_first, jobs, 2))
    assert 1 <= sum(job.exists() for job in jobs) < 10
