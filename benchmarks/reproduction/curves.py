"""Scores of a comparison: read from its CSV, steps to a target, and intervals over the seeds."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.base.errors import UserError
from pipeline.data.arrays import Array

Run = list[dict[str, float]]  # the points of one run's curve, by step
Runs = dict[str, dict[str, Run]]  # by variant and seed
HELD_OUT_LOSS = "held_out_loss"
LOWER = ("bound", HELD_OUT_LOSS)  # scores of which a lower one is better
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


def read_scores(path: Path) -> tuple[list[str], Runs]:
    """Return the names of the scores, and the runs of each variant and seed.

    Raises:
        UserError: for a file without scores.
    """
    runs: dict[str, dict[str, Run]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        for row in table:
            point = {key: float(x) for key, x in row.items() if x and key not in ("variant", "seed")}
            runs[row["variant"]][row["seed"]].append(point)
        columns = list(table.fieldnames or ())
    if not runs or "items" not in columns:
        raise UserError(f"{path} holds no scores: benchmarks/reproduce.py writes them.")
    scores = [name for name in columns[columns.index("items") + 1 :] if not name.endswith("_error")]
    return scores, {
        variant: {seed: sorted(points, key=lambda p: p["step"]) for seed, points in seeds.items()}
        for variant, seeds in runs.items()
    }


def reach(points: Run, target: float, score: str, against: str = "step") -> float | None:
    """Return where a curve first comes to `target`, linearly between its points.

    Args:
        points: of one run, by step.
        target: the wanted score.
        score: its name. A curve begins at 0, 0, except one of a score that is better when lower: the first
            point of that counts as it is.
        against: what is counted on the way: step, tokens, flops, ...
    """
    sign = -1 if score in LOWER else 1
    before = None if score in LOWER else {against: 0.0, score: 0.0}
    for point in points:
        if sign * point[score] >= sign * target:
            if before is None:
                return point[against]
            share = (target - before[score]) / (point[score] - before[score])
            return before[against] + share * (point[against] - before[against])
        before = point
    return None


def steps_ratio(runs: Runs, variant: str, baseline: str, score: str, target: float) -> tuple[Estimate, str]:
    """Return the steps to a target as a share of the baseline's with the same seeds, and its sign.

    A run that never gets there counts with all its steps. The sign is then ``>``, ``<`` where those runs are
    the baseline's alone, or ``?`` where they are on both sides.
    """
    both = [[runs[name][seed] for seed in _paired(runs, variant, baseline)] for name in (variant, baseline)]
    found = [[reach(points, target, score) for points in each] for each in both]
    missing = [None in each for each in found]
    steps = np.array(
        [
            [points[-1]["step"] if at is None else at for at, points in zip(ats, each, strict=True)]
            for ats, each in zip(found, both, strict=True)
        ]
    )
    sign = {(False, False): "", (True, False): ">", (False, True): "<", (True, True): "?"}[tuple(missing)]
    draws = _resampled(steps)
    return _interval(steps[0].mean() / steps[1].mean(), draws[0] / draws[1]), sign


def difference(runs: Runs, variant: str, baseline: str, score: str) -> Estimate | None:
    """Return how far a score is above the baseline's with the same seeds, at the last step that both have it.

    None where they have it at no common step.
    """
    ends = []
    for seed in _paired(runs, variant, baseline):
        both = [{p["step"]: p[score] for p in runs[name][seed] if score in p} for name in (variant, baseline)]
        common = both[0].keys() & both[1].keys()
        if not common:
            return None
        ends.append([each[max(common)] for each in both])
    pairs = np.array(ends).T
    draws = _resampled(pairs)
    return _interval(pairs[0].mean() - pairs[1].mean(), draws[0] - draws[1])


def _paired(runs: Runs, variant: str, baseline: str) -> Sequence[str]:
    seeds = [seed for seed in runs[variant] if seed in runs.get(baseline, {})]
    if not seeds:
        raise UserError(
            f"{variant} and the baseline {baseline} have no seed in common: run both with the same."
        )
    return seeds


def _resampled(pairs: Array) -> Array:
    """Return the means [2, RESAMPLES] of resampled columns of `pairs` [2, seeds]."""
    places = np.random.default_rng(0).integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))
    return pairs[:, places].mean(axis=2)


def _interval(value: float, draws: Array) -> Estimate:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
