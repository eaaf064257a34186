"""Faults injected on one of two ranks of the real program."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.forked import run_forked
from support.programs import ROOT
from support.runs import command, curve

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FAULTY = str(ROOT / "tests/support/faulty.py")
QUIET = "--evaluation.interval 0 --train.log_samples true --optimizer.ema_decay 0.9".split()


def start_faulty(faults: dict[str, Any], data: Path, run_dir: Path, *more: str) -> Any:
    """Train on two ranks with faults; return the finished process."""
    return run_forked(FAULTY, json.dumps(faults), *command(data, run_dir, *QUIET, *more), ranks=2)


def entries(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]


def samples_of(run_dir: Path) -> dict[int, list[int]]:
    """Return the examples of each step, from the logs of both ranks."""
    examples: dict[int, list[int]] = {}
    for rank in range(2):
        for line in (run_dir / f"samples/rank_{rank:05d}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            examples.setdefault(entry["step"], []).extend(example for _, example in entry["samples"])
    return examples


def test_unsound_steps_are_skipped_by_all(data: Path, tmp_path: Path) -> None:
    """NaN, a loss spike and a gradient spike on rank 1 only: both ranks skip the step.

    faulty.py checks on both ranks that a refused step changes neither weights, moments nor average.
    """
    faults = {
        "nan": {"rank": 1, "steps": [5]},
        "norm_spike": {"rank": 1, "steps": [36]},
        "loss_spike": {"rank": 1, "steps": [38]},
    }
    result = start_faulty(faults, data, tmp_path, "--train.steps", "40", "--checkpoint.interval", "20")
    assert result.returncode == 0, result.stderr
    skipped = entries(tmp_path)
    assert [entry["step"] for entry in skipped] == [5, 36, 38]
    for entry, problem in zip(skipped, ("loss is not finite", "gradient norm is", "loss of a"), strict=True):
        assert problem in entry["problem"]
    examples = samples_of(tmp_path)
    assert sorted(examples) == list(range(1, 41)), "the chains continued"
    for entry in skipped:
        assert entry["samples"] == sorted(set(examples[entry["step"]]))
    counted = dict(curve(tmp_path, "skipped_steps"))
    assert (counted[4], counted[8], counted[36], counted[40]) == (0, 1, 2, 3)
    slowest = [rank for _, rank in curve(tmp_path, "ranks/compute_probe_slowest_rank")]
    assert len(slowest) == 10
    assert set(slowest) <= {0, 1}


@pytest.mark.parametrize(("stage", "kind"), [(2, "adamw"), (2, "muon"), (3, "muon")])
def test_other_stages_and_optimizers_skip_alike(data: Path, tmp_path: Path, stage: int, kind: str) -> None:
    """ZeRO-2 calls the guard from another place in DeepSpeed than ZeRO-3; Muon has states of its own."""
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    more = ["--engine.deepspeed_config", str(settings), "--train.steps", "8", "--optimizer.kind", kind]
    result = start_faulty({"nan": {"rank": 1, "steps": [3, 6]}}, data, tmp_path, *more)
    assert result.returncode == 0, result.stderr
    assert [entry["step"] for entry in entries(tmp_path)] == [3, 6]


def test_rollback_leaves_the_samples_out(data: Path, tmp_path: Path) -> None:
    """An example that always gives NaN: after three skipped steps the run rolls back and excludes it."""
    small = "--train.global_batch_size 4 --train.micro_batch_size 1 --train.steps 24".split()
    small += "--guard.skips_before_rollback 3 --schedule.warmup_steps 1 --objective.stages 8".split()
    first = start_faulty({}, data, tmp_path / "sound", *small)
    assert first.returncode == 0, first.stderr
    examples = samples_of(tmp_path / "sound")
    bad = next(each for each in examples[7] if each not in examples[4] and each in examples[9])

    result = start_faulty({"sample": {"sample": bad}}, data, tmp_path / "run", *small)
    assert result.returncode == 0, result.stderr
    *skips, back = entries(tmp_path / "run")
    assert [entry["step"] for entry in skips] == [skips[0]["step"] + i for i in range(3)]
    assert (back["step"], back["rollback_to"]) == (skips[-1]["step"], 4)
    assert back["excluded"] == sorted({example for entry in skips for example in entry["samples"]})
    assert bad in back["excluded"]
    assert "rolled back from step" in result.stdout
    after = samples_of(tmp_path / "run")
    assert sorted(after) == list(range(1, 25))
    assert not any(set(back["excluded"]) & set(after[step]) for step in range(5, 25))
    assert all(len(set(after[step])) == 4 for step in range(5, 25))
    losses = curve(tmp_path / "run", "loss")
    assert [step for step, _ in losses] == list(range(1, 25))
    assert all(math.isfinite(loss) for _, loss in losses)
