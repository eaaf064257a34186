"""Small runs of the trainer, for the tests of everything that happens to a run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.monitor.writers import is_measured
from support.forked import run_forked
from tools import preprocess_data, train_tokenizer

SETTINGS = """
    --model.layers 2 --model.hidden_size 32 --model.intermediate_size 64 --train.steps 16
    --train.global_batch_size 16 --train.micro_batch_size 4 --train.log_interval 4 --schedule.warmup_steps 2
    --objective.stages 4 --data.sequence_length 12 --data.kind pairs --data.split 80,20,0
    --checkpoint.interval 4 --checkpoint.keep 9 --evaluation.interval 8 --evaluation.samples 20
""".split()
KEYS = ["--prompt-key", "prompt", "--answer-key", "answer"]


def write_pairs(folder: Path) -> None:
    """Make a tokenizer and 60 tokenized pairs of different lengths in `folder`."""
    random = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(60):
            prompt = "".join(random.choice(list("abcdef"), random.integers(1, 5)))
            answer = prompt[::-1] + "g" * int(random.integers(0, 4))
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    corpus, tokenizer = str(folder / "corpus.jsonl"), str(folder / "tokenizer")
    train_tokenizer.main(
        ["--input", corpus, *KEYS, "--vocab-size", "16", "--model-type", "char", "--output", tokenizer]
    )
    preprocess_data.main(
        ["--input", corpus, *KEYS, "--tokenizer", tokenizer, "--output-prefix", str(folder / "pairs"),
         "--workers", "1", "--append-eos"]
    )  # fmt: skip


def command(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the settings of a small run on the pairs of `data`."""
    place = ["--run_dir", str(run_dir), "--data.tokenizer", str(data / "tokenizer")]
    return [*place, "--data.prefixes", f"[{data / 'pairs'}]", *SETTINGS, *more]


def train_on(ranks: int, data: Path, run_dir: Path, *more: str) -> str:
    """Train by ZeRO-3 on several ranks; return what was printed."""
    result = run_forked("-m", "pipeline.train", *command(data, run_dir, *more), ranks=ranks)
    assert result.returncode == 0, result.stderr
    return result.stdout


def not_measured(line: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a line that two runs alike share: no times, no memory."""
    return {key: value for key, value in line.items() if not is_measured(key)}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the run's metrics, line by line."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of one metric."""
    return [(int(line["step"]), line[key]) for line in metrics(run_dir) if key in line]


def examples_of(run_dir: Path) -> dict[int, list[tuple[int, int]]]:
    """Return the (epoch, example) pairs of every step, from the files of all ranks."""
    steps: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for path in (run_dir / "samples").iterdir():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps[entry["step"]] += [(epoch, example) for epoch, example in entry["samples"]]
    return steps
