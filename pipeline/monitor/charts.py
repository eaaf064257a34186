"""What the charts of a report show, as data for report.js."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.monitor.dashboard import LAYOUT, tag_of
from pipeline.monitor.run_record import Curve, Record

COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#b07aa1", "#e08e2b", "#5b5b5b", "#17a2a2", "#8c564b")
_MOST_POINTS = 1000  # of a line
_ALL_POINTS = 60_000  # of a page: less than 2 MB
_AXIS_POINTS = 500


def thinned(curve: Curve, most: int) -> tuple[list[tuple[float, float]], int]:
    """Return at most `most` points, each the mean of neighbouring finite points, and how many at most."""
    points = np.array([point for point in curve if all(map(math.isfinite, point))]).reshape(-1, 2)
    parts = np.array_split(points, min(most, max(1, len(points))))
    return [tuple(part.mean(axis=0)) for part in parts if len(part)], max(map(len, parts))


def palette(count: int, ordered: bool = False) -> list[str]:
    """Return CSS colours: distinct ones for a few curves, a blue-to-red scale for many or ordered curves."""
    if count <= len(COLOURS) and not ordered:
        return list(COLOURS[:count])
    return [f"hsl({220 - 220 * number / max(1, count - 1):.0f} 65% 45%)" for number in range(count)]


def chart_data(records: Sequence[Record]) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Return the numbers of the charts below each heading, and the data that they are drawn from.

    One run has the charts of TensorBoard's first page. Several runs are compared curve by curve, but each has
    its own charts of binned metrics. A chart without a point is left out.
    """
    headings: dict[str, list[int]] = {}
    charts: list[dict[str, Any]] = []
    for heading, layout in LAYOUT.items():
        headings[heading] = []
        for title, patterns in layout.items():
            for chart in _charts(title, patterns, records):
                headings[heading].append(len(charts))
                charts.append(chart)
    lines = [line for chart in charts for line in chart["lines"]]
    most = max(2, min(_MOST_POINTS, _ALL_POINTS // max(1, len(lines))))
    for line in lines:
        points, line["each"] = thinned(line.pop("points"), most)
        line["x"], line["y"] = [_short(x) for x, _ in points], [_short(y) for _, y in points]
    runs = {record.name: _axes(record) for record in records}
    return {heading: found for heading, found in headings.items() if found}, {"runs": runs, "charts": charts}


def _charts(title: str, patterns: Sequence[str], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the charts of one entry of the layout, without colours and with all points."""
    names = sorted(
        {
            name
            for record in records
            for name, curve in record.curves.items()
            if any(re.match(pattern, tag_of(name)) for pattern in patterns)
            and any(math.isfinite(value) for _, value in curve)
        },
        key=lambda name: (name != "loss", name),
    )
    if not names:
        return []
    binned = any(names[0].startswith(f"{family}/") for record in records for family in record.binned)
    several = len(records) > 1
    if several and not binned:
        return [
            _chart(title if len(names) == 1 else f"{title}: {name}", records, [name], palette(len(records)))
            for name in names
        ]
    charts = []
    for record in records:
        heading = f"{title}: {record.name}" if several else title
        charts.append(_chart(heading, [record], names, palette(len(names), ordered=binned)))
    return [chart for chart in charts if chart["lines"]]


def _chart(
    title: str, records: Sequence[Record], names: Sequence[str], colours: Sequence[str]
) -> dict[str, Any]:
    """Return a chart of one metric of several runs, or of several metrics of one run; each has a colour."""
    every = [(record, name) for record in records for name in names]
    lines = []
    for colour, (record, name) in zip(colours, every, strict=True):
        family = name.partition("/")[0]
        label = name.removeprefix(f"{family}/") if family in record.binned else name
        if record.curve(name):
            lines.append(
                {
                    "run": record.name,
                    "label": record.name if len(records) > 1 else label,
                    "colour": colour,
                    "points": record.curve(name),
                }
            )
    return {"title": title, "lines": lines}


def _axes(record: Record) -> dict[str, Any]:
    """Return the x-axes of a run at some of its steps, and where its warm-up ends."""
    every = np.unique(np.linspace(0, record.last_step, _AXIS_POINTS).round())
    axes = {name: [_short(at(step)) for step in every.tolist()] for name, at in record.axes().items()}
    return {**axes, "warmup": record.warmup}


def _short(value: float) -> float:
    """Return a number with few digits, an integer where it is one."""
    rounded = float(f"{value:.7g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
