"""Print which objective suits which data: a row for each task and objective (Markdown).

usage: python -m benchmarks.summarize_reproduction addition.csv:easy_1:0.9 text.csv:bound:190

Each argument names a CSV of benchmarks/reproduce.py, a score and a target. Steps to the target are a share of
those of the baseline with the same seeds; a run that does not get there counts with all its steps, which "<"
(the baseline), ">" (the objective) or "?" (both) marks. Behind them are the differences of the scores, at the
last step that both have. Brackets are 95% intervals of a paired bootstrap over the seeds; with few seeds they
are rough.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plot_reproduction import markdown
from benchmarks.reproduction.curves import Estimate, difference, read_scores, steps_ratio
from pipeline.base.cli import ToolParser, run


def summary(path: Path, score: str, target: float, baseline: str) -> list[list[str]]:
    """Return the rows of one task, the head first."""
    scores, runs = read_scores(path)
    head = ["task", "objective", "seeds", f"steps to {score} {target:g}", *(f"{name}" for name in scores)]
    rows = [head]
    for variant in runs:
        if variant == baseline:
            continue
        ratio, sign = steps_ratio(runs, variant, baseline, score, target)
        seeds = len(runs[variant].keys() & runs[baseline].keys())
        last = [difference(runs, variant, baseline, name) for name in scores]
        cells = [sign + _cell(ratio, seeds), *("" if x is None else _cell(x, seeds, "+") for x in last)]
        rows.append([path.stem, variant, str(seeds), *cells])
    return rows


def _cell(estimate: Estimate, seeds: int, sign: str = "") -> str:
    interval = f" [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]" if seeds > 1 else ""
    return f"{estimate.value:{sign}.2f}{interval}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("scores", nargs="+", type=_scores, metavar="CSV:SCORE:TARGET")
    parser.add_argument("--baseline", default="random", help="variant that the others are compared with")
    options = parser.parse_args(arguments)
    tables = [summary(*part, options.baseline) for part in options.scores]
    print(*map(markdown, tables), sep="\n\n")


def _scores(text: str) -> tuple[Path, str, float]:
    try:
        path, score, target = text.rsplit(":", 2)
        return Path(path), score, float(target)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: write CSV:SCORE:TARGET, such as text.csv:bound:190."
        ) from None


if __name__ == "__main__":
    run(main)
