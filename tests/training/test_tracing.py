"""Traces of single steps, and snapshots of memory that ran out.

The snapshot is CUDA's: here a stand-in for torch's two functions shows when they are called.
"""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.profiler import profile

from benchmarks import plot_trace
from pipeline.base.errors import UserError
from pipeline.base.traced import traced
from pipeline.config import Config, ProfilingConfig
from pipeline.monitor.clock import Clock
from pipeline.ranks import join_ranks
from pipeline.training.tracing import memory_snapshots
from support.programs import Outcome
from support.runs import metrics, not_measured
from support.weights import read_weights

Train = Callable[..., Outcome]


@pytest.mark.slow
def test_a_trace_holds_its_steps_and_changes_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that lost its last checkpoint: the same weights and curves as before, and honest rates."""
    run = tmp_path / "run"
    assert train(run).code == 0
    before, lost = metrics(run), tmp_path / "lost"
    (run / "checkpoints/step_00000016").rename(lost)
    write = profile.export_chrome_trace

    def slowly(self: profile, path: str) -> None:
        time.sleep(5)
        write(self, path)

    monkeypatch.setattr(profile, "export_chrome_trace", slowly)
    assert train(run, "--profiling.trace_steps", "[2, 3]").code == 0  # of those that resume after step 12

    [path] = (run / "traces").iterdir()
    assert path.name == "rank_00000.14.pt.trace.json.gz"
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    steps = {event["name"]: event for event in spans if event["name"].startswith("ProfilerStep#")}
    assert len(steps) == 2
    named = [event for event in spans if event["cat"] == "user_annotation"]
    count = Counter(event["name"] for event in named)
    assert {name: count[name] for name in ("inputs", "forward", "chains", "backward", "update")} == {
        "inputs": 8, "forward": 8, "chains": 8, "backward": 8, "update": 2,
    }, "4 micro-batches in each of 2 steps"  # fmt: skip
    first, last = min(s["ts"] for s in steps.values()), max(s["ts"] + s["dur"] for s in steps.values())
    assert all(first <= event["ts"] and event["ts"] + event["dur"] <= last for event in named)
    with profile() as record:
        traced("later")(lambda: None)()
    assert "later" not in {event.key for event in record.key_averages()}, "the trace has ended"

    plot_trace.main(["--run", str(run), "--figure", str(tmp_path / "trace.png")])
    assert Image.open(tmp_path / "trace.png").width > 1000

    weights = read_weights(run / "checkpoints/step_00000016/model")
    for name, weight in read_weights(lost / "model").items():
        assert torch.equal(weights[name], weight), name
    after = metrics(run)
    assert [not_measured(line) for line in after] == [not_measured(line) for line in before]
    [line] = [line for line in after if line["step"] == 16 and "time/training" in line]
    assert line["time/training"] < 5, "the writing is no training"
    assert line["tokens_per_second"] == pytest.approx(16 * 12 / line["time/training"]), "of step 16 alone"


@pytest.mark.slow
def test_an_interval_of_traced_steps_has_no_rates(train: Train, tmp_path: Path) -> None:
    """Neither on the disk nor on the terminal, which shows the rest of them."""
    outcome = train(tmp_path, "--profiling.trace_steps", "[2, 16]", "--train.log_interval", "1")
    assert outcome.code == 0
    assert "masked" in outcome.output
    assert "tokens/s" not in outcome.output
    rated = [line["step"] for line in metrics(tmp_path) if "tokens_per_second" in line]
    assert rated == []
    assert (tmp_path / "traces/rank_00000.2.pt.trace.json.gz").stat().st_size > 0


def test_a_trace_that_cannot_be_written_ends_nothing(train: Train, tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file in the way")
    outcome = train(tmp_path, "--profiling.trace_steps", "[2, 2]")
    assert outcome.code == 0
    assert "rank_00000.2.pt.trace.json.gz cannot be written" in outcome.output


def test_the_clock_stands_still_in_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock()
    for seconds, act in ((10, clock.count), (2, clock.pause), (30, clock.count), (5, clock.resume)):
        now[0] += seconds
        act()
    now[0] += 8
    clock.count()
    clock.leave_out(3)
    assert clock.take() == (2, 10 + 2 + 8 - 3)
    clock.pause()
    now[0] += 50
    clock.count()
    assert clock.take() == (0, 0)
    now[0] += 50
    clock.resume()
    now[0] += 4
    clock.count()
    assert clock.take() == (1, 4)


class Memory:
    """Torch's functions for snapshots."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.record)
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", self.dump)

    def record(self, enabled: str | None = "all", **options: object) -> None:
        self.calls.append(("record", enabled))

    def dump(self, path: str) -> None:
        assert Path(path).parent.is_dir()
        self.calls.append(("dump", path))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_memory_that_runs_out_leaves_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Before the error goes up, and for no other error."""
    memory = Memory(monkeypatch)
    config = Config(str(tmp_path), profiling=ProfilingConfig(memory_snapshot=True))
    ranks = replace(join_ranks("cpu"), device=torch.device("cuda", 0), rank=3)
    with pytest.raises(error), memory_snapshots(config, ranks):
        raise error("too large")
    path = str(tmp_path / "traces/rank_00003.memory.pickle")
    dumped = [("dump", path)] if error is torch.OutOfMemoryError else []
    assert memory.calls == [("record", "all"), *dumped, ("record", None)]


def test_snapshots_need_a_gpu_and_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, ranks = Memory(monkeypatch), join_ranks("cpu")
    with memory_snapshots(Config(str(tmp_path)), ranks):
        pass
    config = Config(str(tmp_path), profiling=ProfilingConfig(memory_snapshot=True))
    with pytest.raises(UserError, match="this rank has no GPU"), memory_snapshots(config, ranks):
        pass
    assert memory.calls == []
