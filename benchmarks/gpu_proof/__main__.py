"""Measure what a GPU makes of this project, and write report.md and proof.json.

usage: python -m benchmarks.gpu_proof [--gpus N] [--only PART ...] [--output FOLDER]

It installs nothing and needs no network. Each part is a program with its own log and time limit; one that
fails is shown in the report and stops nothing. Both files are written anew after each part.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof import report
from benchmarks.gpu_proof.parts import HERE, Part, all_parts
from benchmarks.gpu_proof.runner import chosen, commit, run_part, write_both, write_settings
from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import EXIT_DONE, EXIT_FAILED, UserError, nearest
from pipeline.planning.calibration import SCHEMA

MACHINE = Part("machine", "the machine", ("-m", f"{HERE}.machine", "--output", "{output}"), 10, 60)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit code says whether all of them passed."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--gpus", type=int, default=1, help="train on so many GPUs, by torchrun")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="names or kinds of parts")
    parser.add_argument("--list", action="store_true", help="print the parts and their seconds on one H100")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in miniature, to try it")
    parser.add_argument("--limit", type=int, default=900, help="seconds in total; later parts are left out")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_proof"), help="folder of the report")
    parser.add_argument("--logs", type=Path, help="folder of the logs (default: logs in that of the report)")
    options = parser.parse_args(arguments)
    parts = wanted(options)
    if options.list:
        for part in parts:
            print(f"{part.name:20} {part.kind:10} {part.seconds:4} s  {part.title}")
        print(f"{'total':20} {'':10} {sum(part.seconds for part in parts):4} s")
        return EXIT_DONE
    options.logs = options.logs or options.output / "logs"
    for folder in (options.output, options.logs):
        folder.mkdir(parents=True, exist_ok=True)
    proof = prove(options, parts)
    print(report.summary(proof))
    print(f"wrote {options.output / 'report.md'} and {options.output / 'proof.json'}")
    return EXIT_DONE if all(part["status"] == "passed" for part in proof["parts"].values()) else EXIT_FAILED


def wanted(options: Namespace) -> list[Part]:
    """Return the parts that the command line asks for."""
    parts = all_parts(options.gpus, options.dry_run)
    known = {name for part in parts for name in (part.name, part.kind)}
    for name in options.only:
        if name not in known:
            raise UserError(f"--only {name} is no part.{nearest(name, known)} --list shows them.")
    return chosen(parts, options.only)


def prove(options: Namespace, parts: Sequence[Part]) -> dict[str, Any]:
    """Run the parts and write the report after each; return its content."""
    began, folder = time.monotonic(), options.output
    proof: dict[str, Any] = {
        "schema": SCHEMA,
        "commit": commit(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
        "gpus": options.gpus,
        "machine": None,
        "parts": {},
    }
    with tempfile.TemporaryDirectory(prefix="gpu_proof_") as temporary:
        work = Path(temporary)
        write_settings(work, options.gpus)
        machine = run_part(MACHINE, options.logs, work, MACHINE.limit, options.dry_run)
        proof["machine"] = machine["figures"]
        if machine["figures"] is None:
            proof["parts"]["machine"] = machine
        for part in parts:
            remaining = options.limit - (time.monotonic() - began)
            if remaining < part.seconds and not options.dry_run:
                proof["parts"][part.name] = left_out(part, remaining)
            else:
                limit = min(part.limit, remaining)
                proof["parts"][part.name] = run_part(part, options.logs, work, limit, options.dry_run)
            proof["seconds"] = round(time.monotonic() - began, 1)
            write_both(folder, proof, report.markdown(proof))
            print(report.line(part.name, proof["parts"][part.name]), flush=True)
    return proof


def left_out(part: Part, remaining: float) -> dict[str, Any]:
    """Return the entry of a part for which no time is left."""
    why = f"{remaining:.0f} of the seconds of --limit were left, and it takes {part.seconds}"
    return {
        "title": part.title,
        "kind": part.kind,
        "status": "no time left",
        "figures": None,
        "last_lines": [why],
    }


if __name__ == "__main__":
    run(main)
