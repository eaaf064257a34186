"""Confidence intervals of an accuracy and of a ratio of sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # the standard normal's 97.5% quantile


def wilson_interval(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927), by default at 95%.

    Its ends are the proportions p with |right / total - p| = z sqrt(p (1 - p) / total). Unlike the normal
    approximation it is valid near 0 and 1, and never empty.

    Args:
        right: number of correct items.
        total: number of items, at least 1.
        z: quantile of the standard normal.
    """
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    low = middle - half if right else 0.0  # exact, without rounding
    high = middle + half if right < total else 1.0
    return low, high


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% interval of sum(above) / sum(below); None for a single item.

    The delta method: the standard error of the ratio r is that of the mean of above - r below, divided by the
    mean of below.

    Args:
        above: of each independent item, such as its nats.
        below: of each item, such as its tokens; their sum is positive.
    """
    count = len(above)
    if count < 2:
        return None
    ratio, mean = sum(above) / sum(below), sum(below) / count
    squares = sum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    half = Z95 * math.sqrt(squares / (count - 1) / count) / mean
    return ratio - half, ratio + half
