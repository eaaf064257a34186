"""The sbatch templates alone, without a SLURM: what they do when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.programs import ROOT

pytestmark = pytest.mark.slow


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


PROGRAMS = {
    "scontrol": 'case "$*" in *hostnames*) printf "n1\\nn2\\n";; *requeue*) echo requeue >> "$CALLS";; '
    '"show job"*) echo "Reason=$REASON";; esac',
    "srun": 'echo "srun $* ($SRUN_CPUS_PER_TASK)" >> "$CALLS"; [[ "$*" != *pipeline.train* ]] && exit 0; '
    'trap "" TERM; [ -z "$REASON" ] || kill -s TERM "$PPID"; sleep 0.2; exit 130',
    "python": 'case "$*" in *--summary*) printf "%s" "$ILL";; *successor*) echo "$*" >> "$CALLS";; esac',
}


def pretrain(folder: Path, ill: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the template on two nodes where `ill` fail the health check; return it and what it called."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    shutil.copytree(ROOT / "slurm", folder / "slurm", dirs_exist_ok=True)
    (folder / "slurm" / "site.env").unlink(missing_ok=True)
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "ILL": ill, "REASON": ""}
    job["SLURM_CPUS_PER_TASK"] = "12"
    environment = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}", "PUMA_CODE": str(folder), "CALLS": f"{folder}/calls",
        "LOCAL_DISK": str(folder), **job, **settings,
    }  # fmt: skip
    arguments = [str(folder / "run"), str(ROOT / "configs/tiny_text.yaml")]
    result = subprocess.run(
        ["bash", ROOT / "slurm/pretrain.sbatch", *arguments], env=environment, capture_output=True, text=True
    )
    calls = (folder / "calls").read_text()
    (folder / "calls").unlink()
    return result, calls


def test_an_ill_node_is_left_out(tmp_path: Path) -> None:
    """A successor runs without it, and that is no start in vain; but there is an end to it."""
    for _ in range(3):
        result, calls = pretrain(tmp_path, "n2", MAX_RESTARTS="3")
        assert result.returncode == 75
        assert calls.splitlines()[1:] == [f"{tmp_path}/tools/submit.py successor {tmp_path}/run --exclude n2"]
        assert "--time=10 " in calls.splitlines()[0], "a node whose check hangs must not hold the others"
    result, calls = pretrain(tmp_path, "n2", MAX_RESTARTS="3")
    assert result.returncode == 75
    assert "more than MAX_RESTARTS = 3" in result.stderr
    assert "successor" not in calls
    result, calls = pretrain(tmp_path, "", MAX_RESTARTS="100")
    *steps, last = calls.splitlines()
    assert "pipeline.train" in steps[-1]
    assert all(step.endswith("(12)") for step in steps), "each task has its cores"
    assert last == "requeue"


def test_what_all_nodes_have_is_no_nodes_fault(tmp_path: Path) -> None:
    """A full or lost run folder would drive the job over the whole cluster."""
    result, calls = pretrain(tmp_path, "n1,n2")
    assert result.returncode == 1
    assert "all of n1,n2 failed the health check" in result.stderr
    assert "successor" not in calls
    assert "pipeline.train" not in calls


@pytest.mark.parametrize(("reason", "requeued"), [("TimeLimit", True), ("None", False)])
def test_a_time_limit_before_the_save_is_not_a_cancellation(
    tmp_path: Path, reason: str, requeued: bool
) -> None:
    """The batch shell gets SIGTERM for both; SLURM requeues neither, and only one of them is wanted."""
    result, calls = pretrain(tmp_path, "", REASON=reason)
    assert result.returncode == 130
    assert ("requeue" in calls.splitlines()) is requeued
