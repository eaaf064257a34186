"""Confidence interval of an accuracy."""

from __future__ import annotations

import math

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
