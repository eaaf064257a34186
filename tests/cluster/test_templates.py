"""The sbatch templates alone, without a SLURM: what they do when something is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from programs import ROOT


def run_template(name: str, code: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a template as the batch shell would."""
    environment = {"PATH": "/usr/bin:/bin", "PUMA_CODE": str(code), "SLURM_JOB_ID": "1"}
    script = ROOT / f"slurm/{name}.sbatch"
    return subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["preprocess", "merge", "pretrain", "evaluate", "export"])
def test_without_the_code_nothing_is_done(tmp_path: Path, name: str) -> None:
    """A job submitted from another folder than the checkout must not go on, and say no more than that."""
    result = run_template(name, tmp_path, str(tmp_path / "run"), str(ROOT / "configs/tiny_text.yaml"))
    assert result.returncode == 2
    assert f"{tmp_path}/slurm/stage.sh: No such file" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("merge", []), ("pretrain", []), ("pretrain", ["run"]), ("evaluate", []), ("export", ["run"])],
)
def test_a_missing_argument_is_named(name: str, arguments: list[str]) -> None:
    result = run_template(name, ROOT, *arguments)
    assert result.returncode != 0
    assert f"sbatch slurm/{name}.sbatch " in result.stderr


def test_a_configuration_that_is_missing_is_named(tmp_path: Path) -> None:
    result = run_template("pretrain", ROOT, str(tmp_path / "run"), str(tmp_path / "x.yaml"))
    assert result.returncode == 2
    assert "x.yaml: No such file" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_evaluation_of_nothing_is_no_success(tmp_path: Path) -> None:
    result = run_template("evaluate", ROOT, str(tmp_path))
    assert result.returncode == 2
    assert f"{tmp_path}/checkpoints holds no checkpoint" in result.stderr
