"""Check that this machine is ready: packages, GPUs, compilers, file system, SLURM; with --config, also a run.

Each line is ok, warning (only some runs are affected) or failed, with a remedy. The exit code is 1 if a check
failed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config as configuration
from pipeline.base.cli import ToolParser, add_overrides, in_colours, overrides, run
from pipeline.base.errors import EXIT_DONE, EXIT_FAILED

if TYPE_CHECKING:
    from pipeline.cluster.setup import Finding

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"ok": 32, "warning": 33, "failed": 31}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; return the exit code."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--config", help="also check the settings, data and tokenizer of this run's YAML")
    add_overrides(parser)
    parser.add_argument("--folder", nargs="*", type=Path, default=[Path()], help="folders for runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    config = None
    if options.config is not None:
        config = configuration.load(["--config", options.config, *overrides(options)])
    # Imported now: torch takes seconds, and neither help nor a wrong setting needs it.
    from pipeline.cluster.setup import all_checks

    findings = []
    for check in all_checks(ROOT, options.folder, config):
        for finding in check():
            findings.append(finding)
            if not options.json:
                print(line(finding), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    return EXIT_FAILED if any(finding.state == "failed" for finding in findings) else EXIT_DONE


def line(finding: Finding) -> str:
    """Format a finding as one line, with a coloured state on a terminal."""
    state = f"{finding.state:8}"
    if in_colours(sys.stdout):
        state = f"\033[1;{COLOURS[finding.state]}m{state}\033[0m"
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return f"{state} {finding.what}: {finding.fact}{remedy}"


if __name__ == "__main__":
    run(main)
