"""The chain of jobs: what is submitted, what is refused before anything is."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import config as configuration
from pipeline.cluster.submission import absolute_paths
from pipeline.config.load import flatten
from support.programs import ROOT, Outcome, run_here
from tools import make_sudoku, preprocess_data, submit, train_tokenizer

pytestmark = pytest.mark.slow

Submit = Callable[..., Outcome]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with puzzles, a tokenizer, a dataset and a configuration."""
    folder = tmp_path_factory.mktemp("made")
    corpus = str(folder / "train.jsonl")
    make_sudoku.main([*"--size 4 --count 50 --clues 8 --seed 1 --split train --output".split(), corpus])
    keys = ["--input", corpus, "--prompt-key", "prompt", "--answer-key", "answer"]
    tokenizer = str(folder / "tokenizer")
    train_tokenizer.main([*keys, "--vocab-size", "16", "--model-type", "char", "--output", tokenizer])
    output = ["--tokenizer", tokenizer, "--output-prefix", str(folder / "pairs"), "--workers", "1"]
    preprocess_data.main([*keys, *output])
    (folder / "run.yaml").write_text(
        f"""
run_dir: {folder}/run
data: {{tokenizer: {tokenizer}, prefixes: [{folder}/pairs], kind: pairs, sequence_length: 32}}
train: {{global_batch_size: 16, micro_batch_size: 4}}
"""
    )
    return folder


@pytest.fixture
def call(made: Path, capsys: pytest.CaptureFixture[str]) -> Submit:
    """Return a function that calls the tool with the configuration."""

    def run(*arguments: str) -> Outcome:
        return run_here(submit.main, ["--config", str(made / "run.yaml"), *arguments], capsys)

    return run


def test_dry_run_prints_scripts_and_graph(call: Submit, made: Path) -> None:
    """Every stage's command and script, the dependencies, and nothing is written."""
    outcome = call(
        "--nodes", "2", "--shards", "3", "--corpus", "--input corpus.jsonl", "--evaluate", "--data x.jsonl",
        "--dry-run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.error
    commands = [line for line in outcome.output.splitlines() if line.startswith("### sbatch")]
    stages = ["preprocess", "merge", "pretrain", "evaluate", "export"]
    assert [re.findall(r"(\w+)\.sbatch", command) for command in commands] == [[stage] for stage in stages]
    depends = [
        command.split("afterok:")[-1].split()[0] if "afterok" in command else "" for command in commands
    ]
    assert depends == ["", "JOB_OF_PREPROCESS", "JOB_OF_MERGE", "JOB_OF_PRETRAIN", "JOB_OF_PRETRAIN"]
    assert "--array=0-2" in commands[0]
    assert "--nodes=2" in commands[2]
    for stage in stages:
        assert (ROOT / f"slurm/{stage}.sbatch").read_text() in outcome.output
    graph = outcome.output.strip().splitlines()[-5:]
    assert graph[0] == "preprocess [array 0-2]"
    assert [line.index("└") for line in graph[1:]] == [0, 3, 6, 6]
    assert not (made / "run").exists()


def test_a_stage_left_out_is_stepped_over(call: Submit) -> None:
    """Without merge and pretrain, export waits for what comes before them."""
    outcome = call("--stages", "preprocess,export", "--corpus", "--input corpus.jsonl", "--dry-run")
    assert outcome.output.strip().splitlines()[-2:] == ["preprocess [array 0-0]", "└─ after success: export"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stages", "pretrian"], ["unknown stage 'pretrian'", "'pretrain'"]),
        (["--stages", ""], ["--stages is empty"]),
        (["--stages", "pretrain", "--nodes", "0"], ["--nodes is 0"]),
        (
            ["--stages", "pretrain", "--nodes", "3"],
            ["train.global_batch_size = 16", "3 ranks", "1, 2, 4, 8, 16"],
        ),
        (["--stages", "pretrain", "--set", "engine.sequence_parallel_size=2"], ["1 ranks", "= 2"]),
        (["--stages", "preprocess"], ["--corpus is missing"]),
        (["--stages", "preprocess", "--shards", "2", "--corpus", "--input x"], ["without the merge stage"]),
        (["--stages", "evaluate"], ["--evaluate is missing"]),
        (["--stages", "pretrain", "--set", "data.tokenizer=nowhere"], ["nowhere", "train_tokenizer"]),
        (["--stages", "pretrain", "--set", "data.prefixes=[nowhere]"], ["nowhere", "preprocess_data"]),
        (["--stages", "merge", "--set", "data.prefixes=[a,b]"], ["2 datasets"]),
        (["--stages", "merge", "--set", "data.prefixes=[s3://b/k]"], ["s3://b/k", "a file system"]),
        (["--stages", "pretrain", "--set", "train.stepz=1"], ["'train.stepz'", "'train.steps'"]),
        (
            [
                "--corpus",
                "--input x",
                "--evaluate",
                "--data x",
                "--set",
                "engine.deepspeed_config=nowhere.json",
            ],
            ["engine.deepspeed_config: ", "nowhere.json does not exist"],
        ),
        (["--stages", "pretrain", "--set", "train.global_batch_size=64"], ["64", "lower the batch"]),
        (["--stages", "pretrain"], ["sbatch is not on the PATH"]),
        (["--stages", "pretrain", "--set", "data.prefixes=[s3://b/k]"], ["sbatch is not on the PATH"]),
    ],
)
def test_what_would_fail_is_refused_first(
    call: Submit, arguments: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line before anything is submitted; where there is no SLURM, that is said too."""
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = call(*arguments)
    assert outcome.code == 2
    complaint = outcome.error.strip().splitlines()[-1]
    for part in parts:
        assert part in complaint


def test_a_refused_job_takes_back_those_before_it(
    call: Submit, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A chain is submitted whole or not at all."""
    (tmp_path / "sbatch").write_text(
        f'#!/bin/bash\ncase "$*" in *export*) echo "invalid account" >&2; exit 1;; esac\n'
        f"n=$(($(cat {tmp_path}/n 2>/dev/null || echo 0) + 1)); echo $n | tee {tmp_path}/n\n"
    )
    (tmp_path / "scancel").write_text(f'#!/bin/bash\necho "$1" >> {tmp_path}/cancelled\n')
    for name in ("sbatch", "scancel"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    outcome = call("--stages", "pretrain,export", "--set", f"run_dir={tmp_path}/run")
    assert "sbatch failed: invalid account" in outcome.error
    assert (tmp_path / "cancelled").read_text().split() == ["1"]
    assert not (tmp_path / "run/slurm/submission.json").exists()


def test_successors_keep_away_from_all_nodes_that_were_ill(
    call: Submit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One option holds them all: of several sbatch listens to the last."""
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/calls\necho 7\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\n")
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("PUMA_CODE", str(ROOT))
    run = str(tmp_path / "run")
    assert call("--stages", "pretrain", "--set", f"run_dir={run}").code == 0
    for nodes in ("n1", "n3,n4"):
        assert run_here(submit.main, ["successor", run, "--exclude", nodes], capsys).code == 0
    assert run_here(submit.main, ["successor", run], capsys).code == 0
    excluded = [
        re.findall(r"--exclude=(\S+)", line) for line in (tmp_path / "calls").read_text().splitlines()
    ]
    assert excluded == [[], ["n1"], ["n1,n3,n4"], ["n1,n3,n4"]]


def test_status_of_a_run_that_slurm_has_forgotten(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The journal and the metrics still tell how it ended."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    jobs = [
        {"stage": stage, "options": [], "arguments": [], "after": None, "id": number}
        for number, stage in enumerate(("preprocess", "pretrain", "evaluate"), 10)
    ]
    (run / "slurm/submission.json").write_text(json.dumps({"directory": "/", "jobs": jobs}))
    (run / "slurm/journal.tsv").write_text(
        "1\tpreprocess\t10\t-\tstarted\n2\tpreprocess\t10\t-\tended 0\n"
        "3\tpretrain\t11\t-\tstarted on n[1-2]\n4\tpretrain\t11\t-\tended 2 at step 7\n"
    )
    (run / "config.yaml").write_text((made / "run.yaml").read_text())
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 8):
            file.write(json.dumps({"step": step, "loss": 2.0, "tokens_per_second": 512.0}) + "\n")
    outcome = run_here(submit.main, ["status", str(run)], capsys)
    heading, preprocess, pretrain, evaluate = outcome.output.splitlines()
    assert heading.split() == ["stage", "job", "state", "restarts"]
    assert preprocess.split()[:3] == ["preprocess", "10", "COMPLETED"]
    assert pretrain.split()[:3] == ["pretrain", "11", "FAILED"]
    # 16 sequences of 32 tokens a step, 512 tokens a second: a second for each of the 993 steps left.
    assert "step 7/1,000  3,584 tokens  loss 2.0000  16:33 left" in pretrain
    assert evaluate.split()[:3] == ["evaluate", "12", "UNKNOWN"]
    with (run / "metrics.jsonl").open("a") as file:  # what the writer makes of NaN
        file.write('{"step":8,"loss":null,"tokens_per_second":512.0}\n')
    assert "loss nan" in run_here(submit.main, ["status", str(run)], capsys).output
    nowhere = run_here(submit.main, ["status", str(tmp_path / "nowhere")], capsys)
    assert "nowhere does not exist" in nowhere.complaint()
    not_ours = run_here(submit.main, ["cancel", str(tmp_path)], capsys)
    assert "was not submitted by tools/submit.py" in not_ours.complaint()


def test_site_settings_are_read_by_bash(tmp_path: Path) -> None:
    """Plain bash, expansion and all; what cannot be used is named."""
    from pipeline.base.errors import UserError
    from pipeline.cluster.site import read_site

    assert read_site(tmp_path).tasks_per_node == 1
    (tmp_path / "slurm").mkdir()
    path = tmp_path / "slurm/site.env"
    path.write_text('export GPUS_PER_NODE=4\nTASKS_PER_NODE=$((GPUS_PER_NODE))\nSUBMIT_OPTIONS="--qos=a b"\n')
    site = read_site(tmp_path)
    assert (site.gpus_per_node, site.tasks_per_node, site.options) == (4, 4, ["--qos=a", "b"])
    path.write_text("export GPUS_PER_NODE=eight\n")
    with pytest.raises(UserError, match=r"site.env: GPUS_PER_NODE is 'eight'"):
        read_site(tmp_path)
    path.write_text("source nowhere.sh\n")
    with pytest.raises(UserError, match=r"site.env cannot be read by bash: .*nowhere.sh"):
        read_site(tmp_path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("slurm/*.sbatch")), ids=lambda path: path.name)
def test_templates_are_valid_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_every_path_becomes_absolute(made: Path) -> None:
    """The jobs run in another folder: no setting that holds a path may be forgotten."""
    paths = {"run_dir": "r", "data.tokenizer": "t", "data.prefixes": "[p,/q,s3://b/k]", "data.cache": "c",
             "engine.deepspeed_config": "d", "train.initial_weights": "w",
             "evaluation.tasks": "[{task: exact, data: e}]"}  # fmt: skip
    settings = [part for name, value in paths.items() for part in (f"--{name}", value)]
    config = absolute_paths(
        configuration.load(["--config", str(made / "run.yaml"), *settings]), Path("/base")
    )
    assert [task.data for task in config.evaluation.tasks] == ["/base/e"]
    leaves = flatten(dataclasses.asdict(config))
    del paths["evaluation.tasks"]
    assert {name: leaves[name] for name in paths} == {
        "run_dir": "/base/r", "data.tokenizer": "/base/t", "data.prefixes": ["/base/p", "/q", "s3://b/k"],
        "data.cache": "/base/c", "engine.deepspeed_config": "/base/d", "train.initial_weights": "/base/w",
    }  # fmt: skip
    branch = configuration.load(["--config", str(made / "run.yaml"), "--train.branch_from", "b:8"])
    assert absolute_paths(branch, Path("/base")).train.branch_from == "/base/b:8"


def test_status_and_help_import_neither_torch_nor_megatron(tmp_path: Path) -> None:
    """On a login node they would cost seconds of the only core."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "submission.json").write_text('{"directory": "/", "jobs": []}')
    script = f"""
import contextlib, sys
from tools import submit
with contextlib.suppress(SystemExit):
    submit.main(["status", "--help"])
submit.main(["status", {str(tmp_path)!r}])
print(sorted({{"torch", "megatron", "deepspeed"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert result.stdout.splitlines()[-2].startswith("stage")
