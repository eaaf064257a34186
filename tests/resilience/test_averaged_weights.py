"""The moving average of the weights in a run: evaluation, checkpoints, resume, tools."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.load_model import load_model
from support.programs import Outcome, run_here
from support.runs import curve
from support.weights import read_weights
from tools import generate

pytestmark = pytest.mark.slow
Train = Callable[..., Outcome]


def test_average_in_a_run(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both held-out losses are logged; a resumed average equals the uninterrupted one; tools read both."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run_dir in (whole, parts):
        assert train(run_dir, "--optimizer.ema_decay", "0.99").code == 0
    shutil.rmtree(parts / "checkpoints/step_00000016")
    shutil.rmtree(parts / "checkpoints/step_00000012")
    assert "step 8" in train(parts, "--optimizer.ema_decay", "0.99").output
    for key in ("held_out/loss", "held_out/ema_loss"):
        assert curve(parts, key) == curve(whole, key)
        assert len(curve(parts, key)) == 2
    assert curve(whole, "held_out/loss") != curve(whole, "held_out/ema_loss")

    model = "checkpoints/step_00000016/model"
    for averaged in (False, True):
        weights = [read_weights(run_dir / model, averaged) for run_dir in (whole, parts)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    name = "model.norm.weight"
    device = torch.device("cpu")
    loaded = {kind: load_model(whole, device, weights=kind).model for kind in (None, "ema", "raw")}
    values = {kind: dict(model.named_parameters())[name] for kind, model in loaded.items()}
    assert torch.equal(values["ema"], read_weights(whole / model, averaged=True)[name])
    assert torch.equal(values["raw"], read_weights(whole / model)[name])
    assert torch.equal(values[None], values["ema"]), "the average is the default"
    assert not torch.equal(values["raw"], values["ema"])
    arguments = ["--checkpoint", str(whole), "--prompt", "abc", "--weights"]
    assert [run_here(generate.main, [*arguments, kind], capsys).code for kind in ("ema", "raw")] == [0, 0]


def test_no_average_is_said(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--train.steps", "4").code == 0
    arguments = ["--checkpoint", str(tmp_path / "run"), "--prompt", "abc", "--weights", "ema"]
    complaint = run_here(generate.main, arguments, capsys).complaint()
    assert "optimizer.ema_decay" in complaint
    assert "step_00000004" in complaint
