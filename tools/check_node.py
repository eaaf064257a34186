"""Check the nodes of a job before training (called by slurm/pretrain.sbatch).

Checks GPUs, disk, the files that training reads, the clock and a short all-reduce between the nodes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import EXIT_DONE, EXIT_FAILED, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this node and write its report, or print the bad nodes of a set of reports."""
    parser = ToolParser(__doc__ or "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--report", type=Path, help="check this node and write NODE.json to this folder")
    what.add_argument(
        "--summary", type=Path, help="print the bad nodes in such a folder, separated by commas"
    )
    parser.add_argument("--nodes", default="", help="with --summary: nodes that must have a report")
    parser.add_argument("--gpus", type=int, default=0, help="number of GPUs that a node must have")
    parser.add_argument("--folder", nargs="*", type=Path, default=[], help="folders that must be writable")
    parser.add_argument(
        "--settings",
        nargs=argparse.REMAINDER,
        default=[],
        help="must come last: arguments of pipeline.train, whose files must be readable",
    )
    options = parser.parse_args(arguments)
    if options.summary is not None and not options.nodes:
        raise UserError("--summary needs --nodes: the names of all nodes, separated by commas.")
    # Imported now: torch takes seconds, and neither help nor a wrong option needs it.
    from pipeline.cluster.health import (
        bad_nodes,
        check_alone,
        check_together,
        training_inputs,
        write_report,
    )

    if options.summary is not None:
        bad = bad_nodes(options.summary, options.nodes.split(","))
        for node, reason in bad.items():
            print(f"{node}: {reason}", file=sys.stderr)
        print(",".join(bad))
        return EXIT_DONE
    report = check_alone(options.gpus, options.folder, training_inputs(options.settings))
    write_report(options.report, report)
    nodes = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if nodes > 1:
        # Training uses MASTER_PORT itself, which must be free when it starts.
        port = int(os.environ.get("MASTER_PORT", "29500")) + 1
        address = f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{port}"
        check_together(report, int(os.environ["SLURM_PROCID"]), nodes, address)
        write_report(options.report, report)
    bandwidth = report.all_reduce_gigabytes_per_second
    measured = f", all-reduce {bandwidth:.2f} GB/s" if bandwidth is not None else ""
    unreadable = [f"cannot read {path}" for path in report.unreadable]
    for problem in [*report.problems, *unreadable, *([report.together] if report.together else [])]:
        print(f"{report.node}: {problem}", file=sys.stderr)
    print(f"{report.node}: {len(report.problems)} problems, {report.gpus} GPUs{measured}")
    return EXIT_FAILED if report.problems else EXIT_DONE


if __name__ == "__main__":
    run(main)
