"""Running the project's programs as a user does."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.base import cli, errors

ROOT = Path(__file__).resolve().parents[2]


def environment_of_ranks() -> dict[str, str]:
    """Return the environment of programs that share this machine's cores: one thread each, no GPU."""
    # The deepspeed launcher counts accelerators before the program can say which kind it wants.
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def run_program(*command: str) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND``; its output is kept. `run_forked` does without the time of its imports."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment_of_ranks(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@dataclass
class Outcome:
    """What a program printed, and its exit code."""

    code: int
    output: str
    error: str

    def complaint(self) -> str:
        """Return the one line of an error in the user's input; fail where it is anything else."""
        lines = self.error.strip().splitlines()
        assert self.code == errors.EXIT_BAD_INPUT, self.error
        assert len(lines) == 1, self.error
        assert lines[0].startswith("error: ")
        return lines[0]


def run_here(
    main: Callable[[Sequence[str] | None], int | None],
    arguments: Sequence[str],
    capture: pytest.CaptureFixture[str],
) -> Outcome:
    """Run a program's `main` in this process as its command line would: much faster than a new one."""
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda _: main(arguments))
    printed = capture.readouterr()
    return Outcome(int(ended.value.code or 0), printed.out, printed.err)
