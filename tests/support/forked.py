"""Ranks as a launcher starts them, but forked from a process that has imported torch and DeepSpeed."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO
from unittest import mock

from support.programs import ROOT, environment_of_ranks, free_ports

IMPORTED = """
    torch._dynamo torch.utils.tensorboard pipeline.training.start
    pipeline.engine.plain pipeline.engine.deepspeed
""".split()
GRACE = 10  # seconds between asking the other ranks to end and killing them
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(IMPORTED)


def run_forked(*command: str, ranks: int = 1, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` on each of so many ranks; when one fails, the others are ended.

    The return code is that of the rank that failed first. The output of the ranks is joined in their order.
    """
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    environment = environment_of_ranks() | place
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder, f"{name}_{rank}") for rank in range(ranks)] for name in ("output", "error")]
        processes = [
            _start(command, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, of_rank)
            for rank, of_rank in enumerate(zip(*files, strict=True))
        ]
        code = _first_failure(processes, time.monotonic() + timeout)
        return subprocess.CompletedProcess(
            command, code, *("".join(path.read_text() for path in paths) for paths in files)
        )


def start_forked(name: str, ranks: int, arguments: Sequence[str], device: str = "cpu") -> None:
    """Stand in for `start_ranks` of the benchmarks."""
    result = run_forked("-m", *arguments, ranks=ranks)
    assert result.returncode == 0, (name, result.stderr)


class ForkedPopen:
    """Stands in for `subprocess.Popen` of ``python COMMAND`` in a new session, its output in a file."""

    def __init__(self, command: Sequence[str], env: dict[str, str], stdout: TextIO, **_: object) -> None:
        self.process = _start(command[1:], env, (Path(stdout.name),) * 2)
        self.pid = self.process.pid

    def wait(self, timeout: float) -> int:
        """Return the exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self.process.exitcode


def _start(command: Sequence[str], environment: dict[str, str], files: Sequence[Path]) -> BaseProcess:
    process = FORKING.Process(target=_become, args=(command, environment, files))
    with mock.patch.dict(os.environ, environment):  # the first one starts the process that forks
        process.start()
    return process


def _first_failure(processes: Sequence[BaseProcess], until: float) -> int:
    """Wait for the end of all; return the first exit code that is not 0, or 0."""
    code, running = 0, list(processes)
    try:
        while running and code == 0:
            assert time.monotonic() < until, "the time limit is over"
            wait([process.sentinel for process in running], 1)
            for process in [each for each in running if not each.is_alive()]:
                running.remove(process)
                code = code or process.exitcode or 0
    finally:
        for end in (BaseProcess.terminate, BaseProcess.kill):
            for process in running:
                end(process)
            for process in running:
                process.join(GRACE)
    return code


def _become(command: Sequence[str], environment: dict[str, str], files: Sequence[Path]) -> None:
    """Be ``python COMMAND`` in a new session; `files` get what it prints to stdout and stderr."""
    for number, path in enumerate(files, start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own would be between processes, and outlive this one's os._exit
    kind, program = command[:2] if command[0] in ("-m", "-c") else ("", command[0])
    sys.argv = [program, *command[2 if kind else 1 :]]
    if kind == "-c":
        exec(program, {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")
