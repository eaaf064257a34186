"""tools/average_checkpoints.py: the mean of the weights, what it refuses, and what the result serves for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import train as program
from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import load_model
from pipeline.checkpoint.manifest import AVERAGE, read_manifest
from pipeline.huggingface.export import export
from support.programs import Outcome, run_here
from support.runs import command
from support.weights import read_weights
from tools import average_checkpoints

pytestmark = pytest.mark.slow
Average = Callable[..., Outcome]
MORE = ["--engine.kind", "plain", "--train.steps", "8", "--optimizer.learning_rate", "0.01"]


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with checkpoints at steps 4 and 8, and a moving average."""
    folder = tmp_path_factory.mktemp("run")
    assert program.main(command(data, folder, *MORE, "--optimizer.ema_decay", "0.9")) == 0
    return folder


@pytest.fixture
def average(capsys: pytest.CaptureFixture[str]) -> Average:
    """Return a function that runs the program in this process."""
    return lambda *words: run_here(average_checkpoints.main, [str(word) for word in words], capsys)


def arrays(folder: Path, averaged: bool) -> dict[str, np.ndarray]:
    found = read_weights(folder / "model", averaged)
    return {name: weight.numpy().astype(np.float64) for name, weight in found.items()}


@pytest.mark.parametrize("kind", ["ema", "raw"])
@pytest.mark.parametrize("shares", [(), (1.0, 3.0)])
def test_the_average_is_numpys(
    average: Average, run_dir: Path, tmp_path: Path, kind: str, shares: tuple[float, ...]
) -> None:
    """Every weight to a rounding of fp32; hashes, settings, tokenizer and origin are there."""
    output = tmp_path / "mean"
    names, given = [f"{run_dir}:4", f"{run_dir}:8"], ["--shares", *shares] if shares else []
    outcome = average("--checkpoint", *names, *given, "--weights", kind, "--output", output)
    assert outcome.code == 0, outcome
    folders = [run_dir / f"checkpoints/step_0000000{step}" for step in (4, 8)]
    each = [arrays(folder, kind == "ema") for folder in folders]
    part = np.array(shares or (1.0, 1.0)) / sum(shares or (1.0, 1.0))
    found = arrays(output, False)
    assert found.keys() == each[0].keys() - {"lm_head.weight"}
    for name, weight in found.items():
        expected = part[0] * each[0][name] + part[1] * each[1][name]
        np.testing.assert_allclose(weight, expected, rtol=1e-7, atol=0)
        assert not np.allclose(weight, each[1][name], rtol=1e-3)
    manifest = read_manifest(output)
    assert (manifest.step, manifest.sharding, manifest.held_out_loss) == (8, AVERAGE, None)
    written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert written == set(manifest.files) | {"manifest.json"}, "no scratch file stays"
    origin = json.loads((output / "average.json").read_text())
    assert [(one["step"], one["share"], one["weights"]) for one in origin] == [
        (4, part[0], kind), (8, part[1], kind),
    ]  # fmt: skip


def test_the_result_is_evaluated_exported_and_trained_from(
    average: Average, data: Path, run_dir: Path, tmp_path: Path
) -> None:
    """The loaded model has the mean weights, and a run begins with them, as from their export."""
    output = tmp_path / "mean"
    assert average("--checkpoint", f"{run_dir}:4", f"{run_dir}:8", "--output", output).code == 0
    mean = arrays(output, False)
    loaded = load_model(output, torch.device("cpu"))
    assert loaded.step == 8
    for name, weight in loaded.model.named_parameters():
        np.testing.assert_array_equal(weight.detach().numpy(), mean[name].astype(np.float32))
    assert export(output, tmp_path / "exported", None, "float32", 10**9) == 8
    curves = []
    for place in (output, tmp_path / "exported"):
        run = tmp_path / f"from_{place.name}"
        assert program.main(command(data, run, *MORE, "--train.initial_weights", str(place))) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert curves[0] == curves[1]
    other = command(data, tmp_path / "wide", *MORE, "--train.initial_weights", str(output))
    with pytest.raises(Exception, match=r"has model.hidden_size = 32, the run has 64: set it to 32"):
        program.main([*other, "--model.hidden_size", "64"])
    branch = command(data, tmp_path / "branch", *MORE, "--train.branch_from", str(output))
    with pytest.raises(UserError, match=r"without optimizer states: name it in train.initial_weights"):
        program.main(branch)


def test_what_does_not_fit_is_refused_in_one_line(
    average: Average, data: Path, run_dir: Path, tmp_path: Path
) -> None:
    def refusal(*arguments: Any) -> str:
        outcome = average(*arguments, "--output", tmp_path / "mean")
        assert not (tmp_path / "mean").exists()
        return outcome.complaint()

    four, eight = f"{run_dir}:4", f"{run_dir}:8"
    assert "give two checkpoints or more" in refusal("--checkpoint", four)
    assert "one share above 0 for each" in refusal("--checkpoint", four, eight, "--shares", "1")
    assert "one share above 0 for each" in refusal("--checkpoint", four, eight, "--shares", "1", "0")
    assert "has no checkpoint of step 5" in refusal("--checkpoint", four, f"{run_dir}:5")

    wide = tmp_path / "wide"
    assert program.main(command(data, wide, *MORE, "--model.intermediate_size", "48")) == 0
    message = refusal("--checkpoint", four, wide)
    assert "have different shapes of model.layers.0.mlp.down_proj.weight, (32, 64) and (32, 48)" in message

    copy = tmp_path / "copy"
    shutil.copytree(run_dir / "checkpoints/step_00000008", copy)
    tokenizer = copy / "tokenizer/facts.json"
    for path in (copy / "tokenizer").iterdir():
        if path != tokenizer:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(bytes(content))
    assert "has changed since it was written (sha256)" in refusal("--checkpoint", four, copy)
    (tmp_path / "there").mkdir()
    outcome = average("--checkpoint", four, eight, "--output", tmp_path / "there")
    assert "there exists: remove it, or name another folder" in outcome.complaint()


def test_another_tokenizer_is_refused(
    average: Average, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir / "checkpoints/step_00000008", copy)
    from pipeline.checkpoint import averaging

    load = averaging.Tokenizer.load

    class Other:
        sha256 = "f" * 64

    monkeypatch.setattr(
        averaging.Tokenizer, "load", lambda folder: Other if folder.is_relative_to(copy) else load(folder)
    )
    outcome = average("--checkpoint", f"{run_dir}:8", copy, "--output", tmp_path / "mean")
    assert re.search(r"different tokenizers \(sha256\), .* and f{12}: average", outcome.complaint())


def test_a_link_is_not_followed(average: Average, run_dir: Path, tmp_path: Path) -> None:
    """Not even with --no-verify: it may lead to any file of the machine."""
    shutil.copytree(run_dir, tmp_path / "run")
    config = tmp_path / "run/checkpoints/step_00000008/config.yaml"
    config.rename(tmp_path / "elsewhere.yaml")
    config.symlink_to(tmp_path / "elsewhere.yaml")
    names = [f"{tmp_path}/run:4", f"{tmp_path}/run:8"]
    complaint = average("--checkpoint", *names, "--no-verify", "--output", tmp_path / "mean").complaint()
    assert "config.yaml is a link" in complaint
    assert not (tmp_path / "mean").exists()
