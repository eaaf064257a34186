"""Record every start of a run and how it ended in RUN/history.jsonl, for people and for the report.

One line per start:
``{"started": 1764000000.0, "step": 200, "ranks": 2, "lost_steps": 17, "last_sign": 1763990000.0, "command":
"python -m pipeline.train --config X.yaml", "machine": {"hosts": ["node1"], ...}}``, and one per end:
``{"ended": 1764003600.0, "outcome": "done"}``. A start without an end was killed, or stopped by the watchdog;
the next start records when it last wrote metrics.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil

from pipeline.base.files import append, keep_lines, read_lines

HISTORY_FILE, METRICS_FILE = "history.jsonl", "metrics.jsonl"
KILLED = "killed (no end recorded)"


@dataclass
class Start:
    """One start of a run, as shown in the report.

    Attributes:
        started: start time of the process, seconds since 1970.
        step: the step that it resumed from.
        ranks: number of ranks.
        lost_steps: steps that an earlier start had trained beyond `step`, and that are trained again.
        last_sign: when the previous start last wrote metrics; 0 for the first start.
        command: command line of the first rank's process; empty in the history of an older version.
        machine: see `machine_of`; empty in the history of an older version.
        ended: when it ended or last wrote metrics; None for the latest start, until its end is recorded.
        outcome: how it ended.
        parent: the checkpoint that the run branched from; empty for a run of its own.
    """

    started: float
    step: int
    ranks: int
    lost_steps: int
    last_sign: float = 0.0
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    ended: float | None = None
    outcome: str = KILLED
    parent: str = ""


@contextmanager
def noted(
    run_dir: Path,
    step: int,
    ranks: int,
    lost_steps: int,
    last_sign: float,
    machine: dict[str, Any],
    outcome: Callable[[], str],
    parent: str = "",
) -> Iterator[None]:
    """Record a start, and its end after the block; only the first rank calls this.

    Args:
        run_dir: run folder.
        step: the step that the run resumes from.
        ranks: number of ranks.
        lost_steps: see `Start`.
        last_sign: see `Start`.
        machine: see `Start`.
        outcome: called to describe the end of a block that raised no error.
        parent: see `Start`.
    """
    path = run_dir / HISTORY_FILE
    keep_lines(path, lambda _: True)  # drops the partial line of a killed process
    process = psutil.Process()
    facts: dict[str, Any] = {"step": step, "ranks": ranks, "lost_steps": lost_steps, "last_sign": last_sign}
    facts |= {"command": shlex.join(process.cmdline()), "machine": machine}
    facts |= {"parent": parent} if parent else {}
    _append(path, {"started": process.create_time(), **facts})
    ending = ""
    try:
        yield
        ending = outcome()
    except BaseException as error:
        ending = f"{type(error).__name__}: {error}"
        raise
    finally:
        with suppress(OSError):  # a full disk must not change the exit code
            _append(path, {"ended": time.time(), "outcome": ending})


def _append(path: Path, entry: dict[str, Any]) -> None:
    append(path, orjson.dumps(entry) + b"\n")


def read_history(run_dir: Path) -> list[Start]:
    """Return the starts of a run; raise a `UserError` for a damaged line."""
    starts: list[Start] = []
    for entry in read_lines(run_dir / HISTORY_FILE):
        if "started" in entry:
            start = Start(**entry)
            if starts and starts[-1].ended is None:
                starts[-1].ended = max(starts[-1].started, start.last_sign)
            starts.append(start)
        elif starts:
            starts[-1].ended, starts[-1].outcome = entry["ended"], entry["outcome"]
    return starts
