"""The functions of report.js, run by node where there is one."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest

from support.programs import ROOT

SCRIPT = ROOT / "pipeline/monitor/report.js"
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
]


def call(*calls: tuple[Any, ...]) -> list[Any]:
    """Return the results of calls of functions of the script, each (name, *arguments)."""
    script = SCRIPT.read_text(encoding="utf-8")
    asked = ", ".join(f"{name}({', '.join(map(json.dumps, rest))})" for name, *rest in calls)
    program = f"{script}\nprocess.stdout.write(JSON.stringify([{asked}]));"
    found = subprocess.run(["node", "-"], input=program, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (0.31, 0.3104), (1e18, 9e18), (-5, -4.9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    [found] = call(("ticks", low, high, 5, False))
    assert 3 <= len(found) <= 7
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in found)
    assert f"{found[1] - found[0]:.0e}"[0] in "125"
    assert np.diff(found) == pytest.approx(found[1] - found[0], rel=1e-6)


@pytest.mark.parametrize(("low", "high"), [(1, 1e6), (1e-5, 0.02), (0.4, 6), (1.1, 1.3), (3, 4e18)])
def test_ticks_of_a_log_axis(low: float, high: float) -> None:
    [found] = call(("ticks", low, high, 5, True))
    assert 2 <= len(found) <= 10
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)
    if high / low > 1e4:
        assert all(math.log10(tick) == pytest.approx(round(math.log10(tick))) for tick in found)


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0, 6e-4, False), (0.31, 0.3104, False), (-5, -4.9, False), (0, 1e6, False), (2000, 11000, False),
        (1e18, 9e18, False), (1e-9, 3e-9, False), (1, 1e6, True), (1e-5, 0.02, True), (1.1, 1.3, True),
    ],
)  # fmt: skip
def test_labels_say_where_the_ticks_are(low: float, high: float, log: bool) -> None:
    """Read back, each label is its tick, so no two are alike."""
    [ticks] = call(("ticks", low, high, 5, log))
    [labels] = call(("labels", ticks))
    parts = [re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?)([kMGT]?)", label) for label in labels]
    read = [float(part[1]) * UNITS[part[2]] for part in parts if part]
    assert read == pytest.approx(ticks, rel=1e-6, abs=1e-12 * (high - low))
    assert all(len(label) <= 8 for label in labels)


def test_values_are_read_on_the_lines() -> None:
    """As NumPy interpolates, and finds what is nearest."""
    random = np.random.default_rng(0)
    xs, ys = np.cumsum(random.random(30)), random.normal(size=30)
    at = [*random.uniform(xs[0] - 1, xs[-1] + 1, 20), xs[3], xs[0], xs[-1]]
    found = call(*(("interpolated", xs.tolist(), ys.tolist(), x) for x in at))
    assert found == pytest.approx(np.interp(at, xs, ys))
    found = call(*(("nearest", xs.tolist(), x) for x in at))
    assert found == [int(np.abs(xs - x).argmin()) for x in at]


def test_smoothing_is_an_exponential_average() -> None:
    """Of weights that fall with the distance in steps, in any spacing; none where the weight is zero."""
    random = np.random.default_rng(1)
    steps, values, weight = np.array([1, 2, 4, 5, 9, 11.0]), random.normal(size=6), 0.97
    decay = weight ** (1000 / 10)  # over one step
    gaps = np.diff(steps)
    expected = []
    for i in range(6):
        own = np.array([1.0 if j == 0 else 1 - decay ** gaps[j - 1] for j in range(i + 1)])
        shares = own * decay ** (steps[i] - steps[: i + 1])
        expected.append((shares * values[: i + 1]).sum() / shares.sum())
    [found, same, one] = call(
        ("smoothed", steps.tolist(), values.tolist(), weight),
        ("smoothed", steps.tolist(), values.tolist(), 0),
        ("smoothed", [7], [3.5], 0.9),
    )
    assert found == pytest.approx(expected)
    assert same == pytest.approx(values.tolist())
    assert one == [3.5]


def test_outliers_at_the_start_do_not_flatten_a_curve() -> None:
    """A first loss of 100 is left out; a curve that merely falls, and rare events, are shown whole."""
    settled = (2 + np.sin(np.arange(200)) / 2).tolist()
    falling = np.linspace(3, 1, 200).tolist()
    events = [0.0] * 199 + [1.0]
    flat, whole, rare, few = call(
        ("robustExtent", [100.0, 60.0, *settled], settled),
        ("robustExtent", falling, falling[20:]),
        ("robustExtent", events, events[10:]),
        ("robustExtent", [4.0, 2.0], [2.0]),
    )
    assert flat == pytest.approx([min(settled), max(settled)])
    assert whole == [1.0, 3.0]
    assert rare == [0.0, 1.0]
    assert few == [2.0, 4.0]


def test_numbers_are_readable() -> None:
    values = [0, 0.5, 12, 1234.5678, 123456.7, 1.5e-7, 3e20, -0.25]
    assert call(*(("readable", value) for value in values)) == [
        "0", "0.50000", "12", "1234.6", "123,457", "1.500e-7", "3.000e20", "-0.25000",
    ]  # fmt: skip
