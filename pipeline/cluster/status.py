"""Report the status of a submitted chain, from SLURM, the journal of the jobs and the run's metrics."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipeline import config as configuration
from pipeline.cluster.jobs import Job
from pipeline.cluster.submission import read_submission

TAIL_BYTES = 2**16


@dataclass
class StageStatus:
    """One row of the status table: stage, job, state, restarts and details."""

    stage: str
    job: str
    state: str
    restarts: str
    facts: str


def read_status(run_dir: Path) -> list[StageStatus]:
    """Return the status of each stage of a run; raise a `UserError` if the run was not submitted."""
    journal = _read_journal(run_dir)
    rows = []
    for job in read_submission(run_dir).jobs:
        tasks = _ask_slurm(job)
        state = _summary([task["JobState"] for task in tasks]) if tasks else ""
        last = journal.get(job.stage, "")
        if not state:  # SLURM forgets finished jobs after a few minutes
            state = {"ended 0": "COMPLETED"}.get(
                last[:7], "FAILED" if last.startswith("ended") else "UNKNOWN"
            )
        restarts = max((int(task.get("Restarts", 0)) for task in tasks), default=0)
        facts = describe_training(run_dir) if job.stage == "pretrain" else last
        rows.append(StageStatus(job.stage, str(job.id), state, str(restarts or "-"), facts))
    return rows


def _summary(states: list[str]) -> str:
    """Summarise the states of array tasks: the common state, or how many have completed."""
    if len(set(states)) == 1:
        return states[0]
    return f"{sum(state == 'COMPLETED' for state in states)}/{len(states)} COMPLETED"


def _ask_slurm(job: Job) -> list[dict[str, str]]:
    """Return the fields that scontrol shows for a job and its array tasks; empty if SLURM forgot the job."""
    command = ["scontrol", "show", "job", "-o", str(job.id)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return []
    fields = (
        dict(item.split("=", 1) for item in line.split() if "=" in item)
        for line in result.stdout.splitlines()
    )
    return [each for each in fields if "JobState" in each]


def _read_journal(run_dir: Path) -> dict[str, str]:
    """Return the last journal entry of each stage."""
    path = run_dir / "slurm" / "journal.tsv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {fields[1]: fields[4] for fields in (line.split("\t") for line in lines) if len(fields) == 5}


def describe_training(run_dir: Path) -> str:
    """Describe the progress of a run from its metrics: step, tokens, loss and time left."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return "no step yet"
    with path.open("rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
        lines = file.read().split(b"\n")[1 if os.path.getsize(path) > TAIL_BYTES else 0 : -1]
    points = [json.loads(line) for line in lines]
    config = configuration.load(["--config", str(run_dir / "config.yaml")])
    losses = [point for point in points if "loss" in point]
    if not losses:
        return "no step yet"
    step, steps = int(losses[-1]["step"]), config.train.steps
    tokens, end = (config.train.examples_until(n) * config.data.sequence_length for n in (step, steps))
    loss = losses[-1]["loss"]  # a loss that is not finite is null in JSON
    facts = f"step {step:,}/{steps:,}  {tokens:,} tokens  loss {math.nan if loss is None else loss:.4f}"
    rates = [point["tokens_per_second"] for point in losses if "tokens_per_second" in point]
    if rates and step < steps:
        facts += f"  {tqdm.format_interval((end - tokens) / rates[-1])} left"
    age = time.time() - path.stat().st_mtime
    return facts + (f"  (written {tqdm.format_interval(age)} ago)" if step < steps else "")


def as_table(rows: list[StageStatus]) -> str:
    """Format rows as aligned text with a heading."""
    cells = [("stage", "job", "state", "restarts", ""), *(tuple(vars(row).values()) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
