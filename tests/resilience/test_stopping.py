"""Signals, hangs and diverged runs: how a run ends, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.base import errors
from pipeline.engine.plain import PlainEngine
from support.forked import RANKS, run_forked, torchrun
from support.programs import ROOT, Outcome, environment_of_ranks
from support.runs import command, curve, metrics, train_on

pytestmark = pytest.mark.slow
FAULTY = str(ROOT / "tests/support/faulty.py")
Train = Callable[..., Outcome]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The run finishes the step and saves; the same command then gives the losses of an uninterrupted run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole).code == errors.EXIT_DONE
    step, count = PlainEngine.step, iter(range(1, 100))

    def interrupted(engine: PlainEngine, *arguments: object) -> torch.Tensor:
        if next(count) == 6:
            os.kill(os.getpid(), number)
        return step(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PlainEngine, "step", interrupted)
        outcome = train(parts)
    assert outcome.code == errors.EXIT_REQUEUE == 75
    assert "stopped after step 7" in outcome.output  # step 6 had already exchanged its stop request
    assert signal.getsignal(number) == signal.SIG_IGN, "the launcher must not change the exit code"
    assert "(step 7)" in train(parts).output
    for key in ("loss", "gradient_norm", "held_out/loss"):
        assert curve(parts, key) == curve(whole, key), key


def test_a_stop_that_cannot_be_saved_says_so(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PlainEngine.step

    def interrupted(engine: PlainEngine, *arguments: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(engine, *arguments)

    def failing(path: Path, write: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(PlainEngine, "step", interrupted)
    monkeypatch.setattr("pipeline.checkpoint.saving.write_hashed", failing)
    outcome = train(tmp_path)
    assert outcome.code == errors.EXIT_REQUEUE
    assert "and saved" not in outcome.output
    assert "NOT saved" in outcome.output
    assert "NOT saved" in (tmp_path / "history.jsonl").read_text()


@pytest.mark.parametrize("before", [0, 1], ids=["first", "last-step"])
def test_a_signal_in_an_evaluation(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """The evaluation stops early, and runs again when the run resumes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate, batches = PlainEngine.evaluate, []
    strikes: list[int] = []

    def interrupted(engine: PlainEngine, batch: object) -> object:
        if len(batches) in strikes:
            os.kill(os.getpid(), signal.SIGTERM)
        batches.append(batch)
        return evaluate(engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PlainEngine, "evaluate", interrupted)
        assert train(whole).code == errors.EXIT_DONE
        strikes.append(before * len(batches) // 2)  # of two evaluations
        batches.clear()
        assert train(parts).code == errors.EXIT_REQUEUE
    assert len(batches) == strikes[0] + 1
    assert curve(parts, "held_out/loss") == curve(whole, "held_out/loss")[:before]
    assert train(parts).code == errors.EXIT_DONE
    assert "held_out/loss" not in train(parts).output, "a run that is done ends at once"
    for key in ("loss", "held_out/loss"):
        assert curve(parts, key) == curve(whole, key), key


# Like a hanging collective: no signal returns the main thread to Python.
HANGS = (
    "import ctypes as c; m = c.create_string_buffer(64); [c.CDLL(None).pthread_mutex_lock(m) for _ in '12']"
)


@pytest.mark.parametrize("waiting", ["time.sleep(60)", HANGS], ids=["in-python", "in-c"])
def test_the_second_signal_ends_at_once(waiting: str) -> None:
    """Signals within REPEATS_WITHIN are one request: launchers forward what the process group already got."""
    code = (
        "import signal, time\nsignal.alarm(60)\n"  # ends the process if the test fails
        "from pipeline.resilience import signals\nsignals.REPEATS_WITHIN = 1.0\n"
        f"stop = signals.StopSignals()\nprint('ready', flush=True)\n{waiting}\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "\n"
        assert "SIGTERM: stopping after this step" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)  # the launcher's copy
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == errors.EXIT_INTERRUPTED == 130
        assert "SIGINT again" in process.stderr.read()


def test_a_hopeless_run_fails(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN from step 6 on, for any examples: the run rolls back twice, then exits with EXIT_FAILED."""
    forward = PlainEngine.forward

    def broken(engine: PlainEngine, batch: object) -> object:
        output = forward(engine, batch)
        weights_have_moved = (
            engine.optimizer.state
            and max(float(state["step"]) for state in engine.optimizer.state.values()) >= 5
        )
        return output._replace(loss=output.loss * (float("nan") if weights_have_moved else 1.0))

    monkeypatch.setattr(PlainEngine, "forward", broken)
    small = "--train.global_batch_size 4 --train.micro_batch_size 4 --evaluation.interval 0".split()
    outcome = train(tmp_path, *small, "--guard.skips_before_rollback", "2")
    assert outcome.code == errors.EXIT_FAILED == 1
    (line,) = outcome.error.strip().splitlines()
    for part in (
        "2 steps in a row",
        "step_00000004",
        "guard.max_rollbacks",
        "loss is not finite",
        "skipped.jsonl",
    ):
        assert part in line
    kinds = [
        "rollback_to" in json.loads(each) for each in (tmp_path / "skipped.jsonl").read_text().splitlines()
    ]
    assert kinds == [False, False, True, False, False, True, False, False]


def test_no_checkpoint_to_go_back_to(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PlainEngine.forward
    monkeypatch.setattr(
        PlainEngine, "forward", lambda e, b: (o := forward(e, b))._replace(loss=o.loss * float("inf"))
    )
    outcome = train(tmp_path, "--evaluation.interval", "0")
    assert outcome.code == errors.EXIT_FAILED
    assert "no checkpoint exists" in outcome.error


@pytest.mark.parametrize("turns", ["1", "3"])
def test_a_row_of_refused_steps_survives_a_restart(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: str
) -> None:
    """Two refused steps before a stop and one after it count as three in a row; their examples are excluded.

    With turns, a step's examples are those of the chains that it trained.
    """
    forward, steps = PlainEngine.forward, iter(range(1, 100))  # one forward per step
    trained: dict[int, list[int]] = {}

    def broken(engine: PlainEngine, batch: object) -> object:
        step, output = next(steps), forward(engine, batch)
        entry = json.loads((tmp_path / "samples/rank_00000.jsonl").read_text().splitlines()[-1])
        trained.setdefault(entry["step"], sorted(example for _, example in entry["samples"]))
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return output._replace(loss=output.loss * (float("nan") if step in (6, 7, 8) else 1.0))

    monkeypatch.setattr(PlainEngine, "forward", broken)
    small = "--train.global_batch_size 4 --train.micro_batch_size 4 --evaluation.interval 0".split()
    small += ["--guard.skips_before_rollback", "3", "--objective.turns", turns]
    small += ["--train.log_samples", "true", "--train.steps", "8"]
    assert "stopped after step 7 and saved" in train(tmp_path, *small).output
    outcome = train(tmp_path, *small)
    assert outcome.code == errors.EXIT_DONE, outcome.error
    assert "(3 in a row" in outcome.output
    *skips, back = [json.loads(each) for each in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in skips] == [6, 7, 8]
    assert [entry["samples"] for entry in skips] == [trained[step] for step in (6, 7, 8)]
    assert back["excluded"] == sorted({example for entry in skips for example in entry["samples"]})


@pytest.mark.distributed
def test_one_rank_is_signalled(data: Path, tmp_path: Path) -> None:
    """SIGTERM to rank 1 only: both ranks save after the same step; the resumed run matches a whole one."""
    settings = ["--optimizer.ema_decay", "0.9"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on(2, data, whole, *settings)
    faults = json.dumps({"signal": {"rank": 1, "steps": [6]}})
    result = run_forked(*torchrun(2), FAULTY, faults, *command(data, parts, *settings))
    assert result.returncode == 1, "torchrun returns 1 for any failed rank"
    assert "stopped after step 6 and saved" in result.stdout
    assert result.stderr.count("exitcode  : 75") == 2, result.stderr
    assert "(step 6)" in train_on(2, data, parts, *settings)
    for key in ("loss", "gradient_norm", "held_out/loss", "held_out/ema_loss"):
        assert curve(parts, key) == curve(whole, key), key


@pytest.mark.distributed
def test_the_process_group_is_signalled(data: Path, tmp_path: Path) -> None:
    """Ctrl+C reaches torchrun and its ranks, and torchrun forwards it: still one request."""
    run_dir, files = tmp_path / "run", [tmp_path / "output", tmp_path / "error"]
    arguments = command(data, run_dir, "--train.steps", "100000", "--checkpoint.interval", "50000")
    start = [*torchrun(2), "-m", "pipeline.train", *arguments]
    launcher = RANKS.start(start, environment_of_ranks(), files)
    assert launcher.pid is not None
    ranks = wait_for_steps(launcher.pid, run_dir)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.join(120)
    assert launcher.exitcode not in (None, 0)
    assert "and saved: the same command resumes" in files[0].read_text()
    assert not any(rank.is_running() for rank in ranks)
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert saved.name.startswith("step_")


def wait_for_steps(pid: int, run_dir: Path) -> list[psutil.Process]:
    """Return the processes that the launcher started, once the run has logged a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and metrics(run_dir):
            return psutil.Process(pid).children(recursive=True)
        time.sleep(0.1)
    raise AssertionError("no step within two minutes")


@pytest.mark.distributed
def test_a_hang_is_ended_by_every_rank(data: Path, tmp_path: Path) -> None:
    """Rank 1 sleeps forever at step 9: stacks are reported, and the run exits with EXIT_REQUEUE."""
    faults = json.dumps({"hang": {"rank": 1, "steps": [9]}})
    settings = (
        "--watchdog.minimum 3 --watchdog.factor 3 --evaluation.interval 0 --optimizer.ema_decay 0.9".split()
    )
    began = time.monotonic()
    result = run_forked(FAULTY, faults, *command(data, tmp_path, *settings), ranks=2)
    assert time.monotonic() - began < 120
    assert result.returncode == errors.EXIT_REQUEUE
    reports = {path.stem: path.read_text() for path in (tmp_path / "watchdog").iterdir()}
    assert "rank 1: step has taken" in reports["rank_00001"]
    assert "__main__.faulty_inputs" in reports["rank_00001"]
    if "rank_00000" in reports:  # else rank 1 ended first, and its connection with it
        assert "rank 0: step has taken" in reports["rank_00000"]
        assert "waiting in" in reports["rank_00000"], "rank 0 waits for rank 1 in a collective"
    for report in reports.values():
        assert "Current thread" in report or "Thread 0x" in report
        assert "faulty.py" in report
    shutil.rmtree(tmp_path / "watchdog")
    assert "(step 8)" in train_on(
        2, data, tmp_path, "--evaluation.interval", "0", "--optimizer.ema_decay", "0.9"
    )
