"""When a run was started, and how each start ended: RUN/history.jsonl, for people and for the report.

A line a start: ``{"started": 1764000000.0, "step": 200, "ranks": 2, "lost_steps": 17}``, and a line its end:
``{"ended": 1764003600.0, "outcome": "done"}``. A start without an end was killed, or ended by the watchdog.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from pipeline.files import keep_lines

HISTORY_FILE = "history.jsonl"
KILLED = "killed (no end was noted)"


@dataclass
class Session:
    """One start of a run, as the report shows it.

    Attributes:
        started: when its process began, seconds since 1970.
        step: the step that it went on from.
        ranks: how many.
        lost_steps: steps that an earlier start had done beyond that step; they were done again.
        ended: when it ended; None while it runs, or if it was killed.
        outcome: how.
    """

    started: float
    step: int
    ranks: int
    lost_steps: int
    ended: float | None = None
    outcome: str = KILLED


@contextmanager
def noted(
    run_dir: Path, step: int, ranks: int, lost_steps: int, outcome: Callable[[], str]
) -> Iterator[None]:
    """Note a start, and after the block its end; the first rank does this.

    Args:
        run_dir: the run.
        step: the step that it goes on from.
        ranks: how many.
        lost_steps: see `Session`.
        outcome: asked how a block without an error ended.
    """
    path = run_dir / HISTORY_FILE
    keep_lines(path, lambda _: True)  # half a line of a killed process goes
    started = psutil.Process().create_time()
    _append(path, {"started": started, "step": step, "ranks": ranks, "lost_steps": lost_steps})
    try:
        yield
    except BaseException as error:
        _append(path, {"ended": time.time(), "outcome": f"{type(error).__name__}: {error}"})
        raise
    _append(path, {"ended": time.time(), "outcome": outcome()})


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(orjson.dumps(entry) + b"\n")


def read_history(run_dir: Path) -> list[Session]:
    """Return the starts of a run; half a line that a killed process left does not count."""
    path = run_dir / HISTORY_FILE
    sessions: list[Session] = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        entry = orjson.loads(line)
        if "started" in entry:
            sessions.append(Session(**entry))
        elif sessions:
            sessions[-1].ended, sessions[-1].outcome = entry["ended"], entry["outcome"]
    return sessions
