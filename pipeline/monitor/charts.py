"""Draw line charts as SVG, small enough to embed in an HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]
COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#b07aa1", "#e08e2b", "#5b5b5b", "#17a2a2", "#8c564b")
WIDTH, HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 40  # margins
_MOST_POINTS = 300


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high` (low < high)."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(curve: Curve, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` points, each the mean of neighbouring finite points."""
    points = np.array([point for point in curve if all(map(math.isfinite, point))]).reshape(-1, 2)
    parts = np.array_split(points, min(most, max(1, len(points))))
    return [tuple(part.mean(axis=0)) for part in parts if len(part)]


def short(value: float) -> str:
    """Format a number compactly: 1.5M, 3e+20, 0.05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.3g}" if abs(value) >= 1e12 else f"{value:.4g}"


def palette(count: int, ordered: bool = False) -> list[str]:
    """Return CSS colours: distinct ones for a few curves, a blue-to-red scale for many or ordered curves."""
    if count <= len(COLOURS) and not ordered:
        return list(COLOURS[:count])
    return [f"hsl({220 - 220 * number / max(1, count - 1):.0f} 65% 45%)" for number in range(count)]


def line_chart(title: str, x_label: str, curves: Mapping[str, Curve], ordered: bool = False) -> str:
    """Return an SVG of the curves with a legend, or an empty string if no curve has a point.

    Args:
        title: title of the chart.
        x_label: label of the x-axis.
        curves: points by curve name; points that are not finite are dropped.
        ordered: whether the curves have an order, such as bins; their colours then form a scale.
    """
    lines = {name: points for name, curve in curves.items() if (points := thinned(curve))}
    if not lines:
        return ""
    every = np.array([point for points in lines.values() for point in points])
    (x_low, y_low), (x_high, y_high) = every.min(axis=0), every.max(axis=0)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    room = 0.05 * (y_high - y_low) or max(0.05 * abs(y_high), 0.5)
    y_low, y_high = y_low - room, y_high + room

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, HEIGHT - _BOTTOM - up

    parts = [f'<text x="{_LEFT}" y="18" class="title">{html.escape(title)}</text>']
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{short(value)}</text>')
    for value in ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" class="middle">{short(value)}</text>')
    middle = (WIDTH + _LEFT - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="middle">{html.escape(x_label)}</text>')
    colours = palette(len(lines), ordered)
    for colour, (name, points) in zip(colours, lines.items(), strict=True):
        spots = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        shape = f'<polyline points="{path}" fill="none" stroke="{colour}"/>'
        if len(spots) == 1:
            shape = f'<circle cx="{spots[0][0]:.1f}" cy="{spots[0][1]:.1f}" r="3" fill="{colour}"/>'
        parts.append(f"<g><title>{html.escape(name)}</title>{shape}</g>")
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return picture + _legend(list(lines), colours)


def _legend(names: Sequence[str], colours: Sequence[str]) -> str:
    keys = (
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in zip(names, colours, strict=True)
    )
    return f'<p class="legend">{"".join(keys)}</p>'
