"""The watchdog's limits, and detection of slow ranks."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from pipeline.chains.stream import SlotStream
from pipeline.config import WatchdogConfig
from pipeline.monitor.stragglers import Stragglers
from pipeline.ranks import Ranks
from pipeline.resilience import watchdog as module
from pipeline.resilience.watchdog import Watchdog


def test_limits_follow_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase has its own limit: `first` at first, always for saves; then factor x median or `minimum`."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    dog = Watchdog(WatchdogConfig(factor=10, minimum=30, first=1000), tmp_path, 0)
    dog.enabled = False  # no thread: the clock is fake
    for phase, seconds in [("step", 50), ("step", 2), ("step", 4), ("save", 60), ("step", 5), ("step", 100)]:
        dog.enter(phase)
        clock[0] += seconds
    dog.enter("evaluation")
    assert dog.limit("evaluation") == 1000
    assert dog.limit("save") == 1000  # the last save waits for the write
    assert dog.limit("step") == 50  # 10 x the median of 50, 2, 4, 5, 100: robust to one slow step
    clock[0] += 1
    dog.enter("step")
    assert dog.limit("evaluation") == 30


class SlowStream:
    """A stream with a given waiting time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def take_waited(self) -> float:
        return self.seconds


def test_the_slow_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 3 waits longest for data, and rank 2 has the slowest device."""
    waited, probed = [0.4, 2.0, 0.6], [0.010, 0.011, 0.030]
    total = torch.zeros(6, dtype=torch.float64)
    for rank in range(3):
        stragglers = Stragglers(Ranks(rank, 3, rank), cast(SlotStream, SlowStream(waited[rank])))
        assert stragglers._probe() > 0
        monkeypatch.setattr(stragglers, "_probe", lambda rank=rank: probed[rank])
        total += stragglers.measure(steps=2)
    assert stragglers.figures(total.tolist()) == pytest.approx(
        {
            "ranks/data_wait_slowest": 1.0,
            "ranks/data_wait_median": 0.3,
            "ranks/data_wait_slowest_rank": 1,
            "ranks/compute_probe_slowest": 0.030,
            "ranks/compute_probe_median": 0.011,
            "ranks/compute_probe_slowest_rank": 2,
        }
    )
