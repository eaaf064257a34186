"""Read what a run has recorded, for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.files import read_lines
from pipeline.config.load import flatten, read_yaml
from pipeline.monitor.history import METRICS_FILE, Start, read_history
from pipeline.monitor.scores import Score, read_scores
from pipeline.monitor.texts import ShownText, read_texts
from pipeline.resilience.skipped import SKIPPED_FILE

Curve = Sequence[tuple[float, float]]
TIMES = ("time/training", "time/evaluation", "time/checkpoint_stall")


@dataclass
class Record:
    """The records of a run.

    Attributes:
        name: name on the page.
        settings: configuration, by dotted key.
        curves: (step, value) pairs of each metric, by its name in metrics.jsonl; NAME/BIN for a binned one.
        binned: names of the binned metrics.
        skipped: entries of skipped.jsonl.
        history: starts of the run.
        texts: texts written by the model during training, in order of steps.
        scores: results of tools/evaluate.py.
    """

    name: str
    settings: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]
    binned: set[str]
    skipped: list[dict[str, Any]]
    history: list[Start]
    texts: list[ShownText]
    scores: list[Score]

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) pairs of a metric."""
        return self.curves.get(key, [])

    @property
    def last_step(self) -> int:
        """The last step in the metrics."""
        return self.curve("loss")[-1][0]

    @property
    def warmup(self) -> int:
        """The step from which curves have settled: the end of the warm-up, at most half of the run."""
        return min(self.settings.get("schedule.warmup_steps", 0), self.last_step // 2)

    def total(self, key: str) -> float:
        """Return the sum of a metric over the run."""
        return sum(value for _, value in self.curve(key))

    @property
    def begun_at(self) -> int:
        """The step before the first one; not 0 in a run that branched off another one."""
        return self.curve("loss")[0][0] - 1

    def running_total(self, values: Mapping[int, float]) -> Callable[[float], float]:
        """Return a function of the step: the cumulative sum of `values`, interpolated between their steps."""
        steps = sorted(values)
        places = np.array([self.begun_at, *steps])  # converted once, and not for every point of a long run
        sums = np.cumsum([0.0, *(values[step] for step in steps)])
        return lambda step: float(np.interp(step, places, sums))

    def axes(self) -> dict[str, Callable[[float], float]]:
        """Return the possible x-axes, as functions of the step.

        FLOPs and hours are those of the run alone; steps and tokens include those before a branch.
        """
        tokens = ({} if self.begun_at else {0: 0.0}) | dict(self.curve("progress/tokens"))
        places, counts = np.array([*tokens]), np.array([*tokens.values()])
        flops, before = {}, self.begun_at
        for step, each in self.curve("progress/flops_per_step"):
            flops[step] = each * (step - before)
            before = step
        hours: dict[int, float] = {}
        for key in TIMES:
            for step, seconds in self.curve(key):
                hours[step] = hours.get(step, 0.0) + seconds / 3600
        return {
            "steps": lambda step: step,
            "tokens": lambda step: float(np.interp(step, places, counts)),
            "FLOPs": self.running_total(flops),
            "hours": self.running_total(hours),
        }


def read_record(run_dir: Path, name: str) -> Record:
    """Read the records of the run in `run_dir`.

    Raises:
        UserError: if it is not a run folder, or the run has not logged a step yet.
    """
    for needed in (METRICS_FILE, "config.yaml"):
        if not (run_dir / needed).is_file():
            raise UserError(
                f"{run_dir} has no {needed}: give the folder (run_dir) of a run that has trained a step."
            )
    curves: dict[str, list[tuple[int, float]]] = {}
    binned: set[str] = set()
    for line in read_lines(run_dir / METRICS_FILE):
        step = line.pop("step")
        for key, value in line.items():
            bins = value if isinstance(value, dict) else None
            binned |= set() if bins is None else {key}
            for metric, each in (
                [(key, value)] if bins is None else [(f"{key}/{bin}", of_bin) for bin, of_bin in bins.items()]
            ):
                if each is not None:
                    curves.setdefault(metric, []).append((step, each))
    if "loss" not in curves:
        raise UserError(f"{run_dir / METRICS_FILE} has no step yet: wait for train.log_interval steps.")
    return Record(
        name,
        flatten(read_yaml(run_dir / "config.yaml")),
        curves,
        binned,
        read_lines(run_dir / SKIPPED_FILE),
        read_history(run_dir),
        read_texts(run_dir),
        read_scores(run_dir),
    )
