"""How programs end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from programs import ROOT

# Stands for a thread of torch.distributed that meets a dismantled interpreter.
ABORTS_IN_TEARDOWN = """
import atexit, os, sys
from pipeline import cli

atexit.register(os.abort)


def main(_):
    print("the last line", end="")
    {ending}


cli.run(main, of_ranks={of_ranks})
"""


def end(ending: str, of_ranks: bool) -> subprocess.CompletedProcess[str]:
    """Run the program above."""
    program = ABORTS_IN_TEARDOWN.format(ending=ending, of_ranks=of_ranks)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        ("return 0", 0, ""),
        ("return cli.EXIT_REQUEUE", 75, ""),
        ("raise cli.UserError('no such key')", 2, "error: no such key\n"),
        ("raise cli.Failure('the disk is full')", 1, "error: the disk is full\n"),
    ],
)
def test_a_rank_ends_with_its_own_exit_code(ending: str, code: int, message: str) -> None:
    """Whatever its libraries do when the interpreter is taken apart; all that it printed arrives."""
    result = end(ending, of_ranks=True)
    assert (result.returncode, result.stdout, result.stderr) == (code, "the last line", message)


def test_the_stand_in_aborts_a_program_that_is_taken_apart() -> None:
    """Or the test above could not fail."""
    assert end("return 0", of_ranks=False).returncode == -6


def test_a_crash_of_a_rank_shows_where_python_was() -> None:
    """A library that dies by a signal leaves the Python stack on stderr."""
    result = end("os.kill(os.getpid(), 11)", of_ranks=True)
    assert result.returncode == -11
    assert "Segmentation fault" in result.stderr
    assert "in main" in result.stderr
