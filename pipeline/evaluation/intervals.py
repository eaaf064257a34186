"""How far an accuracy on some items may be from the accuracy on all items there could be."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # the standard normal's 97.5% quantile


def wilson_interval(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson 1927), 95% unless told otherwise.

    Its ends are the shares p with |right / total - p| = z sqrt(p (1 - p) / total). Unlike the normal
    approximation it holds near 0 and 1, and is never empty.

    Args:
        right: items that are right.
        total: items, at least one.
        z: quantile of the standard normal.
    """
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    low = middle - half if right else 0.0  # exactly, whatever the rounding
    high = middle + half if right < total else 1.0
    return low, high
