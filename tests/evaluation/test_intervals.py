"""Wilson's interval against its definition and published values."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.intervals import Z95, wilson_interval


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (3, 7), (500, 1319), (1318, 1319), (0, 10**6)])
@pytest.mark.parametrize("z", [1.0, Z95])
def test_the_ends_solve_the_defining_equation(right: int, total: int, z: float) -> None:
    """(p - right/total)^2 = z^2 p (1 - p) / total is a quadratic equation in p."""
    share, weight = right / total, z * z / total
    roots = np.sort(np.roots([1 + weight, -2 * share - weight, share * share]))
    assert wilson_interval(right, total, z) == pytest.approx(tuple(roots), abs=1e-9)


def test_it_stays_between_0_and_1() -> None:
    assert wilson_interval(0, 100)[0] == 0.0
    assert wilson_interval(100, 100)[1] == 1.0
