"""Run the tests marked gpu, and count them.

usage: python -m benchmarks.gpu_proof.tests --output FILE.json
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.gpu_proof.measuring import output_of, write
from pipeline.base.cli import run
from pipeline.base.errors import EXIT_DONE, EXIT_FAILED

MARK = re.compile(r"^(@|pytestmark = \[?)pytest\.mark\.gpu\b", re.MULTILINE)
ROOT = Path(__file__).resolve().parents[2]


class Counts:
    """A plugin of pytest that notes what became of each test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of a test, or of a set-up that failed or skipped."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome].append(report.nodeid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; fail when one fails, or when there is none."""
    path, counts = output_of(__doc__, arguments), Counts()
    # Other test files import packages that a GPU machine may lack.
    marked = [
        str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()
    ]
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *marked], plugins=[counts])
    write(path, {**counts.outcomes, "exit_code": int(code)})
    return EXIT_DONE if code == pytest.ExitCode.OK else EXIT_FAILED


if __name__ == "__main__":
    run(main)
