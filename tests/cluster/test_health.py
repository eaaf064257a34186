"""The health check of a node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cluster.health import bad_nodes, check_alone
from support.programs import ROOT, Outcome, run_here
from tools import check_node

pytestmark = pytest.mark.slow


def fake_nvidia_smi(folder: Path, gpus: str, processes: str) -> None:
    """Write a program that answers the two queries."""
    path = folder / "nvidia-smi"
    path.write_text(
        f'#!/bin/bash\ncase "$*" in *compute-apps*) printf "{processes}";; *) printf "{gpus}";; esac\n'
    )
    path.chmod(0o755)


def test_what_is_wrong_with_gpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few, memory in use, too hot, a stray process; a healthy node has no problem."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake_nvidia_smi(tmp_path, "0, 3, 40\\n1, 0, 41\\n", "")
    assert check_alone(2, [tmp_path]).problems == []
    fake_nvidia_smi(tmp_path, "0, 40000, 40\\n1, 0, 91\\n", "77, python\\n")
    problems = check_alone(4, []).problems
    assert problems == [
        "2 GPUs, 4 are needed",
        "GPU 0 has 40000 MiB in use before the job",
        "GPU 1 is at 91 °C",
        "stray process on a GPU: 77, python",
    ]
    (tmp_path / "nvidia-smi").unlink()
    assert "nvidia-smi failed" in check_alone(1, []).problems[0]


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in check_alone(0, [tmp_path / "file"]).problems[0]


def test_summary_names_bad_and_silent_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node with a problem and one without a report are printed for --exclude."""
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    good = run_here(check_node.main, ["--report", str(tmp_path), "--folder", str(tmp_path)], capsys)
    assert good.code == 0
    assert json.loads((tmp_path / "n1.json").read_text())["problems"] == []
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    (tmp_path / "file").write_text("")
    bad = run_here(check_node.main, ["--report", str(tmp_path), "--folder", str(tmp_path / "file")], capsys)
    assert bad.code == 1
    outcome = run_here(check_node.main, ["--summary", str(tmp_path), "--nodes", "n1,n2,n3"], capsys)
    assert outcome.output.strip() == "n2,n3"
    assert "n2: " in outcome.error
    assert "n3: no report" in outcome.error


def check(node: str, report: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Run the check of a node that sees the data at `data`."""
    settings = ["--config", str(ROOT / "configs/tiny_text.yaml"), "--data.prefixes", f"[{data}/x]"]
    settings += ["--data.tokenizer", str(ROOT), "--train.initial_weights", f"{data}/weights"]
    settings += ["--evaluation.tasks", f"[{{task: sudoku, data: {data}/held_out.jsonl}}]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", node)
        patch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
        patch.chdir(ROOT)
        return run_here(check_node.main, ["--report", str(report), "--settings", *settings], capsys)


def test_a_node_that_lacks_the_mount_of_the_data_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no node can read is no node's fault: the training itself says what is wrong."""
    data = tmp_path / "data"
    for report in ("before", "after"):
        (tmp_path / report).mkdir()
        lacking = check("n1", tmp_path / report, data, capsys)
        assert lacking.code == 0
        assert f"n1: cannot read {data}/x.bin" in lacking.error
        data.mkdir(exist_ok=True)
        for suffix in ("bin", "idx", "json") if report == "after" else ():
            (data / f"x.{suffix}").touch()
            (data / "held_out.jsonl").touch()
            (data / "weights").mkdir(exist_ok=True)
        check("n2", tmp_path / report, data, capsys)
    nodes = ["n1", "n2"]
    assert bad_nodes(tmp_path / "before", nodes) == {}
    bad = bad_nodes(tmp_path / "after", nodes)
    assert list(bad) == ["n1"]
    for name in ("x.idx", "held_out.jsonl", "weights"):
        assert f"cannot read {data}/{name}, which other nodes can" in bad["n1"]
    assert bad_nodes(tmp_path / "after", ["n1"]) == {}


def test_settings_that_are_wrong_make_no_node_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The training ends with exit code 2 and names them."""
    arguments = ["--report", str(tmp_path), "--settings", "--config", str(ROOT / "configs/tiny_text.yaml")]
    assert run_here(check_node.main, [*arguments, "--train.stepz", "3"], capsys).code == 0
