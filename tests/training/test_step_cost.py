"""A training step never waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import objectives
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import (
    Config,
    EngineConfig,
    GuardConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from pipeline.data.examples import Array
from pipeline.engine.plain import PlainEngine
from pipeline.model.batch import Vocabulary
from pipeline.monitor.recorder import Recorder
from pipeline.monitor.stragglers import Stragglers
from pipeline.ranks import join_ranks
from pipeline.resilience.guard import Guard
from pipeline.train import train_step
from support.host_reads import host_reads
from support.synthetic import Pairs

pytestmark = pytest.mark.slow

SIZE, MASK = 160, 4
KINDS = [
    ObjectiveConfig("puma", stages=3),
    ObjectiveConfig("puma", stages=3, threshold=0.01),
    ObjectiveConfig("random_masking", stratified=True),
    ObjectiveConfig("puma", stages=3, block_size=3, policy="entropy"),
]


class WatchedPairs(Pairs):
    """Pairs that remember which thread read them."""

    def __init__(self) -> None:
        super().__init__(50)
        self.readers: list[str] = []

    def __getitem__(self, index: int) -> dict[str, Array]:
        self.readers.append(threading.current_thread().name)
        return super().__getitem__(index)


class Training:
    """A plain engine and two micro-batches of 4 chains."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        self.config = config = Config(
            "unused",
            model=ModelConfig(
                layers=2, hidden_size=64, heads=4, intermediate_size=48
            ),  # heads for flex_attention
            objective=objective,
            optimizer=OptimizerConfig(gradient_clip=0.5),
            train=TrainConfig(global_batch_size=8, micro_batch_size=4),
            engine=EngineConfig(kind="plain"),
        )
        ranks = join_ranks(config.engine.device)
        self.engine = PlainEngine(config, ranks, Vocabulary(SIZE, SIZE, MASK))
        self.data = WatchedPairs()
        self.stream = SlotStream(self.data, 8, 0, workers=1)
        schedule = objectives.build(config, MASK, True)
        self.groups = [
            SlotGroup(slots, self.stream, schedule, ranks.device) for slots in (range(4), range(4, 8))
        ]
        self.steps = 0

    def step(self, guard: Guard | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Train one step; return loss and gradient norm."""
        self.steps += 1
        return train_step(self.engine, self.groups, 1e-3, self.steps, guard)

    def recorder(self, run_dir: Path) -> Recorder:
        """Return what records the next steps."""
        config = replace(self.config, run_dir=str(run_dir))
        stragglers = Stragglers(self.engine.ranks, self.stream)
        return Recorder(config, SIZE, self.engine, self.groups, stragglers, self.steps + 1)

    def on_host(self) -> list[torch.Tensor]:
        """Return the tensors that are the host's own beside a GPU too."""
        reports = [group._report for group in self.groups]  # pinned, and there before it is read
        counters = [state["step"] for state in self.engine.optimizer.state.values()]  # of AdamW
        return reports + [counter for counter in counters if not counter.is_cuda]

    def close(self) -> None:
        self.stream.close()
        self.engine.close()


@pytest.mark.parametrize("objective", KINDS, ids=["puma", "threshold", "random-masking", "blocks"])
def test_a_step_reads_nothing_back(objective: ObjectiveConfig) -> None:
    """Nothing but each group's report, a host buffer that was filled behind the backward before."""
    training = Training(objective)
    for _ in range(3):
        training.step()
    begun = sum(group.cursors.sum() for group in training.groups)
    for _ in range(6):
        reports = [group._report for group in training.groups]
        with host_reads(training.on_host()) as reads:
            training.step()
        assert reads == []
        with host_reads(training.on_host()[2:]) as reads:  # the reports are not allowed now
            training.step()
        assert reads == ["tolist"] * 2, "one read a group, of its report"
        assert all(one is not two._report for one, two in zip(reports, training.groups, strict=True))
    assert sum(group.cursors.sum() for group in training.groups) > begun, "chains ended on the way"
    training.close()


def test_the_guard_reads_once() -> None:
    """What decides on an update must be on the host: one read a step, after the last backward."""
    training, guard = Training(KINDS[0]), Guard(GuardConfig(), gradient_clip=0.5)
    training.step(guard)
    with host_reads(training.on_host()) as reads:
        training.step(guard)
    assert reads == ["tolist"]
    training.close()


def test_curves_are_read_once_an_interval(tmp_path: Path) -> None:
    """Collecting reads nothing; fetching reads as often for 12 steps as for 2, and not between them."""
    training = Training(KINDS[1])
    training.step()
    recorder = training.recorder(tmp_path)
    counts = []
    for steps in (2, 12):
        for _ in range(steps):
            with host_reads(training.on_host()) as reads:
                loss, norm = training.step()
                recorder.collect(training.steps, loss, norm, 1e-3)
            assert reads == []
        with host_reads(training.on_host()) as reads:
            values = recorder.flush(0, 0)
        counts.append(len(reads))
        assert values["loss"] > 0
    assert counts[0] == counts[1] > 0
    recorder.close()
    training.close()


def test_rates_leave_out_what_is_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation in the middle of an interval is in its own figure, and in no rate."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    training = Training(KINDS[0])
    recorder = training.recorder(tmp_path)
    for seconds_apart in (60.0, 0.0):
        recorder.collect(training.steps, *training.step(), 1e-3)
        now[0] += 10
        with recorder.apart(training.steps, "evaluation"):
            now[0] += seconds_apart
    now[0] += 5
    assert recorder.flush(0, 0)["time/training"] == pytest.approx(25)
    times = [json.loads(line).get("time/evaluation") for line in (tmp_path / "metrics.jsonl").open()]
    assert times[:2] == [60, 0]
    recorder.close()
    training.close()


def test_samples_are_read_ahead() -> None:
    """After the first ones, the training thread itself reads no example."""
    training = Training(KINDS[0])
    training.data.readers.clear()
    for _ in range(20):
        training.step()
    training.close()
    assert len(training.data.readers) > 20
    assert all(name.startswith("samples") for name in training.data.readers)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, x[:1].expand(2)),
        lambda x: torch.where(x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.repeat_interleave(x, x.long()),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_counter_counts(read: Callable[[torch.Tensor], Any]) -> None:
    with host_reads() as reads:
        read(torch.tensor([1.0, 0.0, 2.0]))
    assert len(reads) >= 1


def test_the_counter_lets_what_does_not_wait_pass() -> None:
    x = torch.tensor([1.0, 0.0, 2.0], requires_grad=True)
    with host_reads() as reads:
        y = torch.where(x > 0, x, -x)[torch.tensor([2, 0])] * torch.nonzero_static(x > 0, size=2).sum()
        y.sum().backward()
    assert reads == []


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/proc/driver/nvidia").exists(), reason="no GPU")
def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    """By torch's own check, in a process of its own: the tests hide the GPU from this one."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "steps without waiting" in result.stdout


def main() -> None:
    """Train on the GPU with every wait an error."""
    for objective in KINDS:
        training = Training(objective)
        assert training.engine.ranks.device.type == "cuda"
        for _ in range(3):
            training.step()
        with tempfile.TemporaryDirectory() as folder:
            recorder = training.recorder(Path(folder))
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(6):
                recorder.collect(training.steps + 1, *training.step(), 1e-3)
            torch.cuda.set_sync_debug_mode("default")
            recorder.flush(0, 0)
            recorder.close()
        training.close()
    print("steps without waiting")


if __name__ == "__main__":
    main()
