"""CONTRIBUTING.md: its three recipes, followed in a copy of the code as they stand there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.planning import presets
from support.documents import blocks, text_of
from support.programs import ROOT, environment_of_ranks
from tools import make_sudoku, plan_presets, preprocess_data, train_tokenizer

pytestmark = pytest.mark.slow

PAGE = "CONTRIBUTING.md"
SCRIPT = """
import numpy as np, torch
from pipeline import train
from pipeline.data.examples import Examples
from pipeline.objectives.layouts import Whole
from pipeline.objectives.suffix import SuffixMasking
roles = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (500, 12)).astype(np.int8))
roles[:, -1] = 2
examples = Examples(torch.zeros(500, 12).long(), roles, torch.arange(500))
objective = SuffixMasking(0, Whole(1, True))
chains = objective.layout.chains(examples)
masked = objective.begin(chains, torch.zeros(500, 1).long(), 1).masked.numpy()
counts = []
for role, row in zip(roles.numpy(), masked):
    answer = np.flatnonzero(role == 2)
    counts.append(row.sum() / len(answer))
    assert np.flatnonzero(row).tolist() == answer[len(answer) - row.sum():].tolist()
assert min(counts) > 0 and max(counts) == 1 and len(set(counts)) > 10
train.main('''
    --config configs/sudoku_demo.yaml --run_dir run --data.tokenizer tokenizer --data.prefixes [pairs]
    --objective.kind suffix --engine.kind plain --train.steps 2 --train.log_interval 1
    --schedule.warmup_steps 1 --evaluation.interval 0
'''.split())
"""


def apply(changes: str, folder: Path) -> None:
    """Apply a diff block: below the name of a file, lines to be replaced and those that replace them."""
    path, lines = folder, list[str]()
    old, new = list[str](), list[str]()

    def replace() -> None:
        places = [i for i in range(len(lines)) if lines[i : i + len(old)] == old]
        assert len(places) == 1, f"{path}: {old} is there {len(places)} times"
        lines[places[0] : places[0] + len(old)] = new
        path.write_text("\n".join(lines) + "\n")

    for line in [*changes.splitlines(), "--- ."]:
        if (line.startswith("-") and new) or line.startswith("---"):
            if new:
                replace()
            old, new = [], []
        if line.startswith("--- "):
            path = folder / line.removeprefix("--- ")
            lines = path.read_text().splitlines() if path.is_file() else []
        else:
            (old if line[0] == "-" else new).append(line[1:])


def write(text: str, folder: Path) -> None:
    """Write a block of code or settings to the file that its first line names."""
    (folder / text.splitlines()[0].removeprefix("# ")).write_text(text)


def test_an_objective_and_a_metric(tmp_path: Path) -> None:
    """The new masks are suffixes; a run trains on them, and its metrics have the mean length of an answer."""
    for name in ("pipeline", "configs", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    [module] = blocks(text_of(PAGE), "python", "Add an objective")
    write(module, tmp_path)
    for heading in ("Add an objective", "Add a metric"):
        [changes] = blocks(text_of(PAGE), "diff", heading)
        apply(changes, tmp_path)
    puzzles, tokenizer = tmp_path / "puzzles.jsonl", tmp_path / "tokenizer"
    corpus = ["--input", str(puzzles), "--prompt-key", "prompt", "--answer-key", "answer"]
    make_sudoku.main(["--size", "4", "--count", "100", "--output", str(puzzles)])
    train_tokenizer.main([*corpus, "--vocab-size", "16", "--model-type", "char", "--output", str(tokenizer)])
    place = ["--tokenizer", str(tokenizer), "--output-prefix", str(tmp_path / "pairs"), "--workers", "1"]
    preprocess_data.main([*corpus, *place])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environment_of_ranks() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["chains/answer_length"] for line in steps] == [16, 16]
    assert steps[-1]["chains/mean_length"] == 1


def test_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is planned, alone, and has a row in the table."""
    for name in ("configs", "ds_configs", "docs/explanation", "pipeline/planning"):
        shutil.copytree(ROOT / name, tmp_path / name)
    [settings] = blocks(text_of(PAGE), "yaml", "Add a preset")
    write(settings, tmp_path)
    [changes] = blocks(text_of(PAGE), "diff", "Add a preset")
    apply(changes, tmp_path)
    listed = re.findall(
        r"Preset\(\"text_40m\", (\d+)\)", (tmp_path / "pipeline/planning/presets.py").read_text()
    )
    monkeypatch.setattr(presets, "PRESETS", [presets.Preset("text_40m", int(gpus)) for gpus in listed])
    monkeypatch.setattr(plan_presets, "ROOT", tmp_path)
    plan_presets.main([])
    rows = (tmp_path / presets.DOCUMENT).read_text().splitlines()
    [row] = [row for row in rows if row.startswith("| `text_40m` |")]
    assert "42.1 M" in row
