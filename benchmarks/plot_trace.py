"""Draw the parts of the traced steps, one line a rank, as a figure (PNG).

usage: python -m benchmarks.plot_trace --run runs/mine --figure trace.png

For a first look where no viewer is at hand; the operators and kernels inside the parts are in the trace.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError

PARTS = ("inputs", "forward", "chains", "backward", "update")
STEP = "ProfilerStep#"
Span = tuple[str, float, float]  # name, beginning and duration in ms


def read_spans(path: Path) -> list[Span]:
    """Return the steps and their parts in a trace; the first step begins at 0."""
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = [
        (event["name"], event["ts"] / 1e3, event["dur"] / 1e3)
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith((STEP, *PARTS))
    ]
    begin = min(start for _, start, _ in spans)
    return [(name, start - begin, duration) for name, start, duration in spans]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the traces of a run's newest traced steps, and draw them."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run folder, with traces/")
    parser.add_argument("--figure", type=Path, required=True, help="the PNG to write")
    options = parser.parse_args(arguments)
    paths = sorted((options.run / "traces").glob("rank_*.pt.trace.json.gz"))
    if not paths:
        raise UserError(f"{options.run}/traces has no trace: train with profiling.trace_steps.")
    newest = max(int(path.name.split(".")[1]) for path in paths)
    draw([path for path in paths if path.name.split(".")[1] == str(newest)], options.figure)


def draw(paths: Sequence[Path], figure: Path) -> None:
    """Draw one line a trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot, axes = plt.subplots(figsize=(11, 1.2 + 0.8 * len(paths)), layout="constrained")
    for row, path in enumerate(paths):
        spans = read_spans(path)
        for number, part in enumerate(PARTS):
            bars = [(start, duration) for name, start, duration in spans if name == part]
            axes.broken_barh(bars, (row - 0.35, 0.7), color=f"C{number}", label=part if row == 0 else None)
        for name, start, _ in spans:
            if name.startswith(STEP):
                axes.plot([start, start], [row - 0.45, row + 0.45], color="black", linewidth=1)
    axes.set_yticks(range(len(paths)), [path.name.split(".")[0].replace("_", " ") for path in paths])
    axes.invert_yaxis()
    axes.set_xlabel("ms; a black line begins a step")
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    plot.savefig(figure, dpi=110)
    plt.close(plot)


if __name__ == "__main__":
    run(main)
