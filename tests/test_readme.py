"""The commands of the README, run as they stand there; only the run is shortened."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.programs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = " --train.steps 4 --schedule.warmup_steps 1 --schedule.decay_steps 1 --evaluation.samples 16"


def commands(heading: str) -> list[str]:
    """Return the lines of the first code block below a heading of the README."""
    block = re.search(rf"^## {heading}\n.*?^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block.group(1).strip().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder that looks like a checkout, where data/ and runs/ are nobody else's, with a corpus."""
    for name in ("pipeline", "tools", "configs", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(15000)]
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for _ in range(3000):
            file.write(json.dumps({"text": " ".join(random.choice(words, 60)) + "."}) + "\n")
    return tmp_path


@pytest.mark.distributed
def test_from_your_corpus_to_your_model(checkout: Path) -> None:
    """Activation, then five commands; each succeeds, and the last one prints a completion. Then an export."""
    activate, *five = commands("From your corpus to your model")
    assert activate == "source .venv/bin/activate"
    assert len(five) == 5
    [export] = commands("Out to Hugging Face, and in")
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    printed = []
    for command in [*five, export]:
        if command.startswith("torchrun"):
            command += SHORTER
        elif command.startswith("tensorboard"):  # would serve for ever
            command += " --inspect"
        result = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        printed.append(result.stdout)
    assert "done: 4 steps" in printed[2]
    assert "train/loss" in printed[3]
    assert printed[4].startswith("Once upon a time")
    assert len(printed[4].strip()) > len("Once upon a time")
    assert (checkout / "exported/mine/model.safetensors").exists()


def test_the_two_commands_exist() -> None:
    """`make demo` and `make test` are targets of the Makefile."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands("Two commands"):
        assert line.split()[0] == "make"
        assert line.split()[1] in targets


def test_the_layout_exists() -> None:
    """Every path of the layout table is there."""
    table = README[README.index("## Layout") :]
    for path in re.findall(r"^\| .*? \|", table, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", path):
            assert (ROOT / name).exists(), name
