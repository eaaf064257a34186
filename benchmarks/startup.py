"""Seconds until every program has printed its help, or refused a setting; the least of several starts.

python -m benchmarks.startup --output benchmarks/results/startup.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run

ROOT = Path(__file__).resolve().parents[1]
REFUSED = ["-m", "pipeline.train", "--config", "configs/tiny_text.yaml", "--train.steps", "0"]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def commands() -> dict[str, list[str]]:
    """Return what is started, by name."""
    found = {"pipeline.train --help": ["-m", "pipeline.train", "--help"]}
    found |= {f"tools/{p.name} --help": [str(p), "--help"] for p in sorted((ROOT / "tools").glob("*.py"))}
    found["pipeline.evaluation.harness --help"] = ["-m", "pipeline.evaluation.harness", "--help"]
    found["pipeline.train --train.steps 0"] = REFUSED
    found["torchrun, 2 ranks: pipeline.train --train.steps 0"] = [*LAUNCHER, *REFUSED]
    found["torchrun alone, 2 ranks: nothing"] = [*LAUNCHER, "--no-python", "true"]
    return found


def seconds(command: Sequence[str], starts: int) -> float:
    """Return the least wall time of several starts of ``python COMMAND``."""
    times = []
    for _ in range(starts):
        began = time.perf_counter()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True)
        times.append(time.perf_counter() - began)
    return min(times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every program and write the results."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--starts", type=int, default=3, help="starts of each program")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    results = {}
    for name, command in commands().items():
        results[name] = round(seconds(command, options.starts), 2)
        print(f"{results[name]:6.2f} s  {name}", flush=True)
    if options.output is not None:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
        tree = {"machine": machine, "starts": options.starts, "seconds": results}
        options.output.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
