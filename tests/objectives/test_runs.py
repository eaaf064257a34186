"""Every objective as users run it: from the command line to a resumed run and a decoded text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.manifest import find
from support.programs import Outcome, run_here
from support.runs import curve
from tools import generate

RUNS = {
    "blocks": "--objective.block_size 3 --objective.policy margin --objective.threshold 0.2",
    "autoregressive, then annealed": "--objective.kind autoregressive --objective.switch_to puma "
    "--objective.switch_step 6 --model.prediction shifted --objective.attention_annealing_steps 12",
    "mixture under a growing K": "--objective.random_share 0.3 --objective.complementary true "
    "--objective.stages_increment 1 --objective.stages_first_increase 3 --objective.stages_interval 3",
    "bernoulli": "--objective.kind random_masking --objective.mask_count bernoulli "
    "--objective.stratified true",
}


@pytest.mark.parametrize("name", RUNS)
def test_trains_resumes_and_decodes(
    name: str, train: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run cut off behind its first checkpoint repeats the losses of the whole one, bit for bit."""
    settings = [*RUNS[name].split(), "--train.steps", "8", "--evaluation.interval", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *settings).code == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_00000008")
    assert "step 4" in train(parts, *settings).output
    for key in ("loss", "masked_fraction", "held_out/loss"):
        assert curve(parts, key) == curve(whole, key), key
    assert [step for step, _ in curve(whole, "held_out/loss")] == [4, 8]
    said = run_here(generate.main, ["--checkpoint", str(whole), "--prompt", "ab", "--length", "4"], capsys)
    assert said.code == 0
    assert said.output.startswith("ab")


def test_a_new_objective_is_not_judged_by_the_losses_of_the_one_before(
    train: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Its higher level would be refused as a spike, and the run go back again and again."""
    settings = RUNS["autoregressive, then annealed"].split()
    assert train(tmp_path, *settings, "--train.steps", "8").code == 0
    for step, compared in ((4, 4), (8, 3)):
        guard = find(tmp_path / f"checkpoints/step_{step:08d}")[1].guard
        assert (len(guard["losses"]), len(guard["norms"])) == (compared, compared)


def test_a_shifted_model_asks_for_a_prompt(
    train: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--model.prediction", "shifted", "--train.steps", "4").code == 0
    said = run_here(generate.main, ["--checkpoint", str(tmp_path), "--prompt", "", "--length", "4"], capsys)
    assert "at least one given token" in said.complaint()
