"""Turn the scores of a comparison of objectives into tables (Markdown, on stdout) and a figure (PNG).

usage: python -m benchmarks.plot_reproduction --scores addition.csv --figure addition.png

All numbers are means over the seeds, with the standard deviation between seeds behind them. Steps to a target
are those to a share of the first score, the one that all checkpoints have; they are read off each run's own
curve, linearly between its points, before they are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.reproduction.curves import Runs, reach, read_scores
from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError

TARGETS = (0.5, 0.7, 0.9)
MOST = 6  # objectives that a figure can show
TWICE = "_twice"
COLOURS = {  # the same in every figure; no figure shows two objectives of one colour
    "random": "black",
    "random_bell": "tab:green",
    "random_bell_narrow": "tab:olive",
    "random_stratified": "tab:gray",
    "puma": "tab:red",
    "puma_threshold": "tab:pink",
    "puma_mixed": "tab:pink",
    "puma_turns": "tab:orange",
    "puma_turns_mixed": "tab:blue",
    "puma_turns_8_mixed": "tab:blue",
    "puma_turns_8": "tab:orange",
    "puma_turns_8_mixed_bell": "tab:cyan",
    "puma_jumps": "tab:brown",
    "random_then_puma": "tab:purple",
    "chain_random_order": "tab:gray",
}
COSTS = {
    "tokens": ("M tokens", 1e6),
    "unique_samples": ("unique samples", 1),
    "flops": ("TFLOP", 1e12),
    "seconds": ("s", 1),
}


def spread(values: Sequence[float], digits: int) -> str:
    """Return ``mean ± standard deviation``."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def last_points(scores: Sequence[str], runs: Runs) -> list[list[str]]:
    """Return the table of the last scores of each variant."""
    rows = [["objective", "runs", "steps", *(name.replace("_", " ") for name in scores)]]
    for variant, each in runs.items():
        ends = [points[-1] for points in each.values()]
        cells = [spread([end[key] for end in ends], 2) for key in scores]
        rows.append([variant, str(len(each)), f"{mean(end['step'] for end in ends):.0f}", *cells])
    return rows


def ways(score: str, runs: Runs, baseline: str) -> list[list[str]]:
    """Return the table of the steps to each target, and of the other costs of the middle one.

    A mean is given where every run has come there, otherwise how many have; and its share of the mean of the
    baseline's runs with the same seeds, where all of those have come there, too.
    """
    middle = TARGETS[1]
    head = ["objective", *(f"steps to {target:.0%} (of {baseline}'s)" for target in TARGETS)]
    rows = [[*head, *(f"{name} to {middle:.0%}" for name, _ in COSTS.values())]]
    for variant, each in runs.items():
        cells = []
        for target in TARGETS:
            steps = [reach(points, target, score) for points in each.values()]
            others = [runs.get(baseline, {}).get(seed, []) for seed in each]
            base = [reach(points, target, score) for points in others]
            whole = None not in (*steps, *base)
            ratio = f" ({mean(filter(None, steps)) / mean(filter(None, base)):.2f})" if whole else ""
            cells.append(_mean_or_count(steps) + ratio)
        costs = [
            _mean_or_count([reach(points, middle, score, key) for points in each.values()], unit)
            for key, (_, unit) in COSTS.items()
        ]
        rows.append([variant, *cells, *costs])
    return rows


def _mean_or_count(values: Sequence[float | None], unit: float = 1) -> str:
    there = [value / unit for value in values if value is not None]
    if len(there) < len(values):
        return f"{len(there)} of {len(values)} runs"
    return spread(there, max(0, 2 - math.floor(math.log10(max(there)))))


def markdown(rows: list[list[str]]) -> str:
    """Return a table in Markdown; the first row is the head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def draw(scores: Sequence[str], runs: Runs, path: Path) -> None:
    """Draw the first score and the bound against steps, and a third panel.

    It has the second score where all checkpoints have one, otherwise the first against unique examples. A
    line is the mean over the seeds, the shade the range between them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    first, second = scores[:2]
    everywhere = all(second in p for each in runs.values() for points in each.values() for p in points)
    third = ("step", second) if everywhere else ("unique_samples", first)
    panels = [("step", first), ("step", "bound"), third]
    for panel, (across, up) in zip(axes, panels, strict=True):
        for variant, each in runs.items():
            colour, style = COLOURS.get(variant.removesuffix(TWICE)), "--" if TWICE in variant else "-"
            common = set.intersection(*({p["step"] for p in points} for points in each.values()))
            met = [[p for p in points if p["step"] in common] for points in each.values()]
            places = [mean(p[across] for p in at) for at in zip(*met, strict=True)]
            heights = [[p[up] for p in at] for at in zip(*met, strict=True)]
            panel.plot(places, list(map(mean, heights)), color=colour, ls=style, label=variant)
            ends = [list(map(end, heights)) for end in (min, max)]
            panel.fill_between(places, *ends, color=colour, alpha=0.15, lw=0)
        panel.set_xlabel({"step": "optimizer steps"}.get(across, across.replace("_", " ")))
        panel.set_ylabel({"bound": "bound, nats an answer"}.get(up, f"held out, {up.replace('_', ' ')}"))
        panel.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and draw the figure."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--scores", type=Path, required=True, help="the CSV")
    parser.add_argument("--figure", type=Path, help="PNG file for the curves")
    parser.add_argument("--shown", nargs="+", help=f"variants in the figure, at most {MOST}; default: all")
    parser.add_argument("--baseline", default="random", help="variant that the others' steps are a share of")
    options = parser.parse_args(arguments)
    scores, runs = read_scores(options.scores)
    tables = last_points(scores, runs), ways(scores[0], runs, options.baseline)
    print(*map(markdown, tables), sep="\n\n")
    if options.figure:
        shown = options.shown or list(runs)
        if len(shown) > MOST or not runs.keys() >= set(shown):
            raise UserError(f"--shown {' '.join(shown)}: choose at most {MOST} of {', '.join(runs)}.")
        draw(scores, {name: runs[name] for name in shown}, options.figure)


if __name__ == "__main__":
    run(main)
