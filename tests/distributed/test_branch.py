"""A branch under another ZeRO stage and world size: the plain engine, branched alike, is the oracle."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.programs import Outcome
from support.runs import curve, train_on

pytestmark = pytest.mark.distributed

Train = Callable[..., Outcome]
# The reveals do not ask the model, as in test_elastic.py.
COMMON = "--optimizer.weight_decay 0.5 --optimizer.ema_decay 0.9 --schedule.kind wsd --data.workers 0".split()
PARENT = [*COMMON, "--objective.kind", "random_masking", "--train.steps", "4"]
BRANCH = """
    --objective.policy random --objective.turns 3 --train.global_batch_size 8 --data.split 70,30,0
    --evaluation.interval 4 --schedule.rewarm_steps 6
""".split()


def test_a_branch_changes_layout_batch_objective_and_data(data: Path, train: Train, tmp_path: Path) -> None:
    """From ZeRO-3 on 2 ranks to ZeRO-2 on one; resumed on 2 ranks after the parent is gone."""
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    for steps, begin in (
        ("4", PARENT),
        ("12", [*COMMON, *BRANCH, "--train.branch_from", f"{plain / 'parent'}"]),
    ):
        name = "parent" if begin is PARENT else "branch"
        assert train(plain / name, *begin, "--train.steps", steps).code == 0
    zero = tmp_path / "zero2.json"
    zero.write_text('{"zero_optimization": {"stage": 2}}')
    parent, branch = sharded / "parent", sharded / "branch"
    train_on(2, data, parent, *PARENT)
    before = {
        path: hashlib.sha256(path.read_bytes()).digest() for path in parent.rglob("*") if path.is_file()
    }
    more = [*COMMON, *BRANCH, "--train.branch_from", f"{parent}:4", "--engine.deepspeed_config", str(zero)]
    output = train_on(1, data, branch, *more, "--train.steps", "8")
    assert f"branched from {parent}/checkpoints/step_00000004 (step 4)" in output
    after = {path: hashlib.sha256(path.read_bytes()).digest() for path in parent.rglob("*") if path.is_file()}
    assert after == before, "the parent is untouched, and no converted form is beside its checkpoints"
    assert [path.name for path in (branch / "checkpoints").iterdir()] == ["step_00000008"]
    shutil.rmtree(parent)
    assert "(step 8, written by 1 ranks)" in train_on(2, data, branch, *more, "--train.steps", "12")
    for key in ("loss", "gradient_norm", "learning_rate", "held_out/loss", "held_out/ema_loss"):
        expected, found = dict(curve(plain / "branch", key)), dict(curve(branch, key))
        assert found == pytest.approx(expected, abs=1e-5), key
    assert len(dict(curve(branch, "loss"))) == 8
