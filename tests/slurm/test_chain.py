"""The whole chain on a real two-node SLURM, hurt in every way that a cluster has."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.checkpoint.manifest import checkpoints
from pipeline.cluster.submission import read_submission
from support.cluster import Cluster, wait_for
from support.forked import run_forked
from support.weights import read_weights

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


def submit(cluster: Cluster, run: Path, *arguments: str) -> str:
    """Submit the run with its corpus and puzzles."""
    corpus = f"--input {run}/train.jsonl --prompt-key prompt --answer-key answer --unit-bytes 8000"
    chain = ["--config", f"{run}/run.yaml", "--nodes", "2", "--shards", "2", "--checkpoints", "2"]
    evaluation = f"--data {run}/held-out.jsonl"
    return cluster.python("tools/submit.py", *chain, "--corpus", corpus, "--evaluate", evaluation, *arguments)


def job_id(run: Path, stage: str) -> int:
    """Return the present number of a stage's job."""
    job = read_submission(run / "run").job(stage)
    assert job is not None
    assert job.id is not None
    return job.id


def wait_for_progress(run: Path, start: int) -> None:
    """Wait until the pretraining job has started for the `start`-th time and written a newer checkpoint."""

    def starts() -> int:
        lines = journal(run) if (run / "run/slurm/journal.tsv").exists() else []
        return sum(line[1] == "pretrain" and line[4].startswith("started") for line in lines)

    wait_for(f"start {start} of the pretraining", lambda: starts() == start)
    before = checkpoints(run / "run")
    wait_for(f"a checkpoint after start {start}", lambda: checkpoints(run / "run")[-1:] > before[-1:])


def kill_one_rank() -> None:
    """Kill the training process of the second node, without warning."""
    for process in psutil.process_iter(["cmdline"]):
        if (
            "pipeline.train" in (process.info["cmdline"] or [])
            and process.environ().get("SLURM_PROCID") == "1"
        ):
            process.kill()
            return
    raise AssertionError("no training process of rank 1")


def journal(run: Path) -> list[list[str]]:
    """Return the lines that the stages wrote, in order: time, stage, job, task, what."""
    return [line.split("\t") for line in (run / "run/slurm/journal.tsv").read_text().splitlines()]


def test_chain_with_every_kind_of_interruption(cluster: Cluster, run: Path) -> None:
    """Requeued, a task killed, the signal before the time limit: the model is that of an undisturbed run."""
    cluster.site("requeue")
    printed = submit(cluster, run)
    assert "pretrain" in printed
    pretrain = job_id(run, "pretrain")
    wait_for_progress(run, 1)
    cluster.call("scontrol", "requeue", str(pretrain))
    wait_for_progress(run, 2)
    kill_one_rank()
    wait_for_progress(run, 3)
    cluster.call("scancel", "--signal=USR1", "--batch", str(pretrain))
    facts = cluster.wait_state(pretrain, "COMPLETED", "FAILED", "CANCELLED")
    assert facts["JobState"] == "COMPLETED"
    assert int(facts["Restarts"]) == 3
    for stage in ("evaluate", "export"):
        assert cluster.wait_state(job_id(run, stage), "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    status = cluster.python("tools/submit.py", "status", f"{run}/run")
    assert "step 150/150" in status
    assert status.count("COMPLETED") == 5
    # The stages ran in order: each began after the one it depends on had ended well.
    lines = journal(run)
    ended = {line[1]: number for number, line in enumerate(lines) if line[4].startswith("ended 0")}
    began = {
        line[1]: number for number, line in reversed(list(enumerate(lines))) if line[4].startswith("started")
    }
    for before, after in (
        ("preprocess", "merge"),
        ("merge", "pretrain"),
        ("pretrain", "evaluate"),
        ("pretrain", "export"),
    ):
        assert ended[before] < began[after]
    # The batch script of the requeued start is ended too: it may or may not come to note its code.
    codes = [line.split("\t")[2] for line in (run / "run/slurm/restarts.tsv").read_text().splitlines()]
    *requeued, killed, signalled, last = codes
    assert requeued in ([], ["75"])
    assert killed not in ("0", "2", "75")
    assert (signalled, last) == ("75", "0")
    # One task of the array a checkpoint.
    results = sorted(path.name for path in (run / "run/evaluation").iterdir())
    assert results == ["step_00000140.json", "step_00000150.json"]
    assert len(json.loads((run / "run/evaluation/step_00000150.json").read_text())["items"]) == 20
    assert list((run / "run/export").glob("*.safetensors"))
    undisturbed = ["--config", f"{run}/run.yaml", "--run_dir", f"{run}/undisturbed"]
    result = run_forked("-m", "pipeline.train", *undisturbed, ranks=2)
    assert result.returncode == 0, result.stderr
    weights, expected = (
        read_weights(run / name / "checkpoints/step_00000150/model") for name in ("run", "undisturbed")
    )
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def test_a_successor_takes_over(cluster: Cluster, run: Path) -> None:
    """Without the right to requeue: another job resumes the run, and the dependents wait for it."""
    cluster.site("successor")
    submit(cluster, run)
    first = job_id(run, "pretrain")
    wait_for_progress(run, 1)
    cluster.call("scancel", "--signal=USR1", "--batch", str(first))
    cluster.wait_state(first, "FAILED", "COMPLETED")
    second = job_id(run, "pretrain")
    assert second != first
    assert cluster.wait_state(second, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert cluster.wait_state(job_id(run, "evaluate"), "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert "step 150/150" in cluster.python("tools/submit.py", "status", f"{run}/run")


def test_bad_configuration_and_no_progress_end_the_job(cluster: Cluster, run: Path) -> None:
    """A wrong setting fails at once; a crash without a newer checkpoint is not repeated for ever."""
    cluster.site("requeue")
    submit(
        cluster,
        run,
        "--stages",
        "preprocess,merge,pretrain",
        "--set",
        "checkpoint.interval=1000",
        "train.steps=900",
    )
    crashing = job_id(run, "pretrain")
    wait_for(
        "steps",
        lambda: (run / "run/metrics.jsonl").exists() and (run / "run/metrics.jsonl").read_bytes() != b"",
    )
    kill_one_rank()
    facts = cluster.wait_state(crashing, "FAILED", "COMPLETED", "PENDING")
    assert facts["JobState"] == "FAILED"
    assert facts["Restarts"] == "0"
    submit(cluster, run, "--stages", "pretrain")
    (run / "run/slurm/config.yaml").write_text("no settings")
    facts = cluster.wait_state(job_id(run, "pretrain"), "FAILED", "COMPLETED")
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")


def test_cancel_saves_and_does_not_come_back(cluster: Cluster, run: Path) -> None:
    """`cancel` lets the training write a checkpoint, takes the dependents away, and nothing is requeued."""
    cluster.site("requeue")
    submit(cluster, run, "--set", "checkpoint.interval=1000", "train.steps=900")
    pretrain, evaluate = job_id(run, "pretrain"), job_id(run, "evaluate")
    wait_for(
        "steps",
        lambda: (run / "run/metrics.jsonl").exists() and (run / "run/metrics.jsonl").read_bytes() != b"",
    )
    cluster.python("tools/submit.py", "cancel", f"{run}/run")
    facts = cluster.wait_state(pretrain, "CANCELLED", "COMPLETED", "FAILED", "PENDING")
    assert facts["JobState"] == "CANCELLED"
    assert cluster.job(evaluate)["JobState"] == "CANCELLED"
    wait_for("the end of the job", lambda: len(checkpoints(run / "run")) == 1, 30)
