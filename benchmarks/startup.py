"""Seconds until every program has printed its help, and refused a wrong setting; the least of several starts.

CPU seconds (user and system) do not depend on what else the machine runs; wall seconds do.

python -m benchmarks.startup --output benchmarks/results/startup.json
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.figures import add_output, write_figures
from benchmarks.trainings import ROOT
from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import EXIT_BAD_INPUT, EXIT_DONE

NOTE = "cpu is user and system time; wall depends on what else the machine runs (load, 1 = one busy core)"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
HARNESS = "-m pipeline.evaluation.harness"
# What each program refuses: a value where it can be wrong, else a path that is not there.
REFUSED = {
    "-m pipeline.train": "--config configs/tiny_text.yaml --train.steps 0",
    HARNESS: "--model puma --tasks none --model_args checkpoint=nowhere,steps=0",
    "tools/average_checkpoints.py": "--checkpoint nowhere --output nowhere --shares 1 2",
    "tools/check_node.py": "--summary nowhere",
    "tools/check_setup.py": "--config nowhere.yaml",
    "tools/demo.py": "--sudoku",
    "tools/evaluate.py": "--checkpoint nowhere --data nowhere.jsonl",
    "tools/export_hf.py": "--checkpoint nowhere --output nowhere",
    "tools/generate.py": "--checkpoint nowhere --prompt x",
    "tools/import_hf.py": "--input nowhere --output nowhere",
    "tools/inspect_data.py": "nowhere",
    "tools/make_sudoku.py": "--size 4 --count 0 --output nowhere",
    "tools/merge_datasets.py": "--datasets nowhere --output-prefix nowhere/x",
    "tools/plan_presets.py": "--gpus 8",
    "tools/plan_run.py": "--config configs/tiny_text.yaml --set model.vocab_size=300 --gpu abacus",
    "tools/prepare_tinygsm.py": "--input nowhere.jsonl --output nowhere",
    "tools/preprocess_data.py": "--input nowhere.jsonl --tokenizer nowhere --output-prefix nowhere/x",
    "tools/report.py": "nowhere",
    "tools/submit.py": "--config configs/tiny_text.yaml --nodes 0",
    "tools/train_tokenizer.py": "--input nowhere.jsonl --output nowhere --vocab-size 0",
}


def commands() -> dict[str, list[str]]:
    """Return what is started, by name."""
    found: dict[str, list[str]] = {}
    for program, refused in REFUSED.items():
        found |= {f"{program} {arguments}": [program, arguments] for arguments in ("--help", refused)}
    found = {name: " ".join(parts).split() for name, parts in found.items()}
    found["torchrun, 2 ranks: pipeline.train --train.steps 0"] = [
        *LAUNCHER,
        *f"-m pipeline.train {REFUSED['-m pipeline.train']}".split(),
    ]
    found["torchrun alone, 2 ranks: nothing"] = [*LAUNCHER, "--no-python", "true"]
    return found


def seconds(command: Sequence[str], starts: int, codes: Sequence[int]) -> tuple[float, float]:
    """Return the least CPU time, and the least wall time, of several starts of ``python COMMAND``.

    Args:
        command: after ``python``.
        starts: number of starts.
        codes: exit codes it may end with.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    times = []
    for _ in range(starts):
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(process.pid, 0)  # with the children that the process has waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in codes:
            raise SystemExit(
                f"python {' '.join(command)} ended with {process.returncode}, not one of {codes}"
            )
        times.append((used.ru_utime + used.ru_stime, time.perf_counter() - began))
    return min(cpu for cpu, _ in times), min(wall for _, wall in times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every program and write the results."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--starts", type=int, default=3, help="starts of each program")
    add_output(parser)
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, float]] = {}
    for name, command in commands().items():
        codes = [EXIT_DONE] if name.endswith(("--help", "nothing")) else [EXIT_BAD_INPUT, 1]
        cpu, wall = seconds(command, options.starts, codes)
        results[name] = {"cpu": round(cpu, 2), "wall": round(wall, 2)}
        print(f"{cpu:6.2f} s of CPU {wall:6.2f} s  {name}", flush=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]}
    figures = {"note": NOTE, "machine": machine, "starts": options.starts, "seconds": results}
    write_figures(options.output, figures)


if __name__ == "__main__":
    run(main)
