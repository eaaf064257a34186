"""Running the project's programs as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import cli

ROOT = Path(__file__).resolve().parents[1]


def run_program(*command: str, ranks: int = 1, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` alone, or under torchrun on several ranks; its output is kept."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
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
        assert self.code == cli.EXIT_BAD_INPUT, self.error
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
