"""A branch takes weights, states, average and step from another run, and nothing else; closed forms."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.monitor.report import read_record
from support.programs import Outcome, run_here
from support.runs import curve, metrics, not_measured
from tools import report

pytestmark = pytest.mark.slow

Train = Callable[..., Outcome]
PEAK = 3e-4
PARENT = "--objective.kind random_masking --schedule.kind wsd --optimizer.ema_decay 0.9".split()
QUIET = ["--evaluation.interval", "0"]


@pytest.fixture
def parent(template: Path, train: Train) -> Path:
    """Return a stable run of random masking with checkpoints of steps 4, 8, 12 and 16."""
    if not template.exists():
        assert train(template, *PARENT, *QUIET).code == 0
    return template


def content(folder: Path) -> dict[str, tuple[int, str]]:
    """Return time and hash of every file, and the time of every folder."""
    paths = [folder, *sorted(folder.rglob("*"))]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths]
    return {str(p): (p.stat().st_mtime_ns, each) for p, each in zip(paths, hashes, strict=True)}


def state_of(run_dir: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the plain engine saved, and its moving average."""
    folder = run_dir / f"checkpoints/step_{step:08d}/model"
    states = (torch.load(folder / name, weights_only=True) for name in ("plain.pt", "ema_00000.pt"))
    return next(states), next(states)


@pytest.mark.parametrize("step", [8, 12])
def test_decays_off_a_stable_run(train: Train, parent: Path, tmp_path: Path, step: int) -> None:
    """WSD's use: one stable run, and a decay of 4 steps from two of its checkpoints."""
    before = content(parent)
    more = [
        "--train.branch_from",
        f"{parent}:{step}",
        "--train.steps",
        str(step + 4),
        "--schedule.decay_steps",
        "4",
    ]
    more += ["--schedule.decay_shape", "1-sqrt", "--schedule.final_ratio", "0", "--checkpoint.interval", "1"]
    outcome = train(tmp_path / "run", *PARENT, *QUIET, *more)
    assert outcome.code == 0
    assert f"branched from {parent}/checkpoints/step_{step:08d} (step {step})" in outcome.output
    rates = {step + done: PEAK * (1 - math.sqrt(done / 4)) for done in range(1, 5)}
    assert dict(curve(tmp_path / "run", "learning_rate")) == pytest.approx(rates, abs=1e-12)
    weights = [state_of(tmp_path / "run", step + done)[0]["model"] for done in (2, 3, 4)]
    for name, last in weights[2].items():
        assert torch.equal(last, weights[1][name]), "the last rate is 0"
    assert any(not torch.equal(value, weights[0][name]) for name, value in weights[1].items())
    assert content(parent) == before, "nothing is written to the parent"


def test_what_a_branch_carries_over(train: Train, parent: Path, tmp_path: Path) -> None:
    """One step at rate 0: the weights stay, and moments, counter and average follow from the parent's.

    The gradient is that which the first moment shows; the second one must have seen the same.
    """
    more = ["--train.branch_from", f"{parent}:8", "--train.steps", "9", "--schedule.decay_steps", "1"]
    more += ["--schedule.final_ratio", "0", "--train.global_batch_size", "8", "--data.split", "50,50,0"]
    assert train(tmp_path / "run", *PARENT, *QUIET, *more).code == 0
    (old, old_average), (new, new_average) = state_of(parent, 8), state_of(tmp_path / "run", 9)
    for name, weight in new["model"].items():
        assert torch.equal(weight, old["model"][name]), name
    for number, state in new["optimizer"]["state"].items():
        earlier = old["optimizer"]["state"][number]
        assert (float(earlier["step"]), float(state["step"])) == (8, 9)
        gradient = (state["exp_avg"].double() - 0.9 * earlier["exp_avg"].double()) / 0.1
        assert gradient.abs().max() > 0
        expected = 0.95 * earlier["exp_avg_sq"].double() + 0.05 * gradient.square()
        torch.testing.assert_close(state["exp_avg_sq"].double(), expected, rtol=1e-4, atol=1e-10)
    assert (old_average["updates"], new_average["updates"]) == (8, 9)
    for name, piece in new_average["pieces"].items():
        mean = (old_average["pieces"][name]["elements"] + new["model"][name].flatten()) / 2  # d = 9 / 18
        torch.testing.assert_close(piece["elements"], mean, rtol=1e-6, atol=1e-8)
    tokens = 8 * 16 * 12 + 1 * 8 * 12
    assert dict(curve(tmp_path / "run", "progress/tokens")) == {9: tokens}


def test_a_run_is_lengthened_beyond_its_plan(train: Train, parent: Path, tmp_path: Path) -> None:
    """A finished run, 8 steps more of a longer cosine, a climb of 6; resumed within it without the parent."""
    more = ["--train.branch_from", str(parent), "--train.steps", "24", "--schedule.rewarm_steps", "6"]
    more += [
        "--objective.kind",
        "random_masking",
        "--optimizer.ema_decay",
        "0.9",
        "--evaluation.interval",
        "4",
    ]
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    assert train(run_dir, *more).code == 0

    def cosine(step: int) -> float:
        return PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 22)))

    rates = {step: cosine(step) * min(1.0, (step - 16) / 6) for step in range(17, 25)}
    assert dict(curve(run_dir, "learning_rate")) == pytest.approx(rates)
    whole = [not_measured(line) for line in metrics(run_dir)]
    shutil.rmtree(run_dir / "checkpoints/step_00000024")
    manifests = sorted(run_dir.glob("checkpoints/*/manifest.json"))
    named = [json.loads(path.read_text())["parent"] for path in manifests]
    written = (parent / "checkpoints/step_00000016/manifest.json").read_bytes()
    digest = hashlib.sha256(written).hexdigest()
    assert named == [{"run": str(parent.resolve()), "step": 16, "manifest_sha256": digest}]
    parent.rename(moved)
    try:
        outcome = train(run_dir, *more)
    finally:
        moved.rename(parent)
    assert "(step 20)" in outcome.output
    assert [not_measured(line) for line in metrics(run_dir)] == whole
    newest = json.loads((run_dir / "checkpoints/step_00000024/manifest.json").read_text())
    assert newest["parent"] == named[0], "a resumed branch remembers its parent"


def test_puma_after_random_masking(
    train: Train, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Examples and stages are those of a new run of PUMA from its first step on, at another batch."""
    puma = ["--train.global_batch_size", "8", "--objective.policy", "random", "--objective.turns", "2"]
    puma += ["--train.log_samples", "true", "--train.log_interval", "1", *QUIET]
    branch = ["--train.branch_from", f"{parent}:8"]
    assert train(tmp_path / "new", *puma, "--train.steps", "8").code == 0
    assert train(tmp_path / "run", *puma, *branch).code == 0
    lines = [
        [json.loads(line) for line in (tmp_path / name / "samples/rank_00000.jsonl").read_text().splitlines()]
        for name in ("new", "run")
    ]
    assert [line["samples"] for line in lines[0]] == [line["samples"] for line in lines[1]]
    assert [line["step"] for line in lines[1]] == list(range(9, 17))
    masked = [[value for _, value in curve(tmp_path / name, "masked_fraction")] for name in ("new", "run")]
    assert masked[0] == masked[1]
    axes = read_record(tmp_path / "run", "run").axes()
    assert axes["tokens"](16) == 8 * 16 * 12 + 8 * 8 * 12, "with those before the branch"
    each = [value for _, value in curve(tmp_path / "run", "progress/flops_per_step")]
    assert len(each) == 8
    assert axes["FLOPs"](16) == pytest.approx(sum(each)), "of the branch alone"
    output = tmp_path / "report.html"
    assert run_here(report.main, [str(tmp_path / "run"), "--output", str(output)], capsys).code == 0
    assert f"<td>branched from</td><td>{parent.resolve()}, step 8 (manifest " in output.read_text()


@pytest.mark.parametrize(
    ("given", "more", "problem"),
    [
        ("{parent}:999", [], "has no checkpoint of step 999: choose from 4, 8, 12, 16"),
        ("{parent}x", [], "holds no checkpoint: give a run folder"),
        ("{run}", [], "which is the run itself"),
        ("{run}:8", [], "which is the run itself"),
        ("{parent}:8", ["--train.initial_weights", "x"], "a run begins from one of them"),
        ("{parent}:8", ["--model.hidden_size", "64"], "model.hidden_size = 32, the run has 64: set it to 32"),
        ("{parent}:8", ["--model.vocab_size", "48"], "model.vocab_size = 16, the run has 48: set it to 16"),
        ("{parent}:8", ["--train.steps", "8"], "is already at step 8"),
        ("{parent}:8", ["--engine.kind", "deepspeed"], "engine.kind = plain, the run has deepspeed"),
        (
            "{parent}:8",
            ["--optimizer.decay_norms_and_embeddings", "true"],
            "= False, the run has True: set it",
        ),
        ("{parent}:8", ["--schedule.rewarm_steps", "-1"], "schedule.rewarm_steps is -1"),
        ("null", ["--schedule.rewarm_steps", "4"], "has no effect without train.branch_from"),
    ],
)
def test_what_cannot_be_branched_from(
    train: Train, parent: Path, tmp_path: Path, given: str, more: list[str], problem: str
) -> None:
    """One line, exit code 2, and nothing is written."""
    run_dir, before = tmp_path / "run", content(parent)
    named = given.format(parent=parent, run=run_dir)
    assert problem in train(run_dir, "--train.branch_from", named, *more).complaint()
    assert not run_dir.exists()
    assert content(parent) == before


def test_another_tokenizer_is_refused(train: Train, parent: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(parent, tmp_path / "copy"))
    facts = copy / "checkpoints/step_00000008/tokenizer/tokenizer.json"
    digest = json.loads(facts.read_text())["sha256"]
    facts.write_text(facts.read_text().replace(digest, "0" * 64))
    complaint = train(tmp_path / "run", "--train.branch_from", f"{copy}:8").complaint()
    assert "has another tokenizer than data.tokenizer" in complaint
    assert not (tmp_path / "run").exists()


def test_damaged_weights_are_refused(train: Train, parent: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(parent, tmp_path / "copy"))
    weights = copy / "checkpoints/step_00000008/model/plain.pt"
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    complaint = train(tmp_path / "run", *QUIET, "--train.branch_from", f"{copy}:8").complaint()
    assert "model/plain.pt has changed since it was written (sha256): restore it, or branch" in complaint
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_resumed_run_keeps_its_parent(train: Train, parent: Path, tmp_path: Path) -> None:
    """The setting may stay, be left out, or name the same parent otherwise; another one is refused."""
    run_dir, begin = tmp_path / "run", ["--train.branch_from", f"{parent}:12", *PARENT, *QUIET]
    assert train(run_dir, *begin).code == 0
    for same in (["--train.branch_from", str(parent)], []):
        assert train(run_dir, *PARENT, *QUIET, *same).code == 0
    complaint = train(run_dir, *PARENT, *QUIET, "--train.branch_from", f"{parent}:8").complaint()
    assert f"branched from {parent.resolve()}, step 12 (manifest " in complaint
    other = Path(shutil.copytree(parent, tmp_path / "other"))
    complaint = train(other, *PARENT, *QUIET, "--train.branch_from", f"{parent}:8").complaint()
    assert "which is no branch: remove the setting" in complaint
