"""The recipe of the 125M text run, on a few records of the same form: every step, with a tiny network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from pipeline import train
from support.programs import ROOT, run_here
from tools import evaluate, preprocess_data

pytestmark = pytest.mark.slow

TINY = """
    --model.layers 1 --model.hidden_size 32 --model.heads 2 --model.intermediate_size 64
    --model.vocab_size 256
    --data.sequence_length 128 --train.steps 4 --train.global_batch_size 8 --train.micro_batch_size 8
    --schedule.warmup_steps 2 --engine.kind plain --checkpoint.interval 4 --checkpoint.keep_every 0
    --evaluation.interval 2 --data.split 90,10,0
""".split()


def write_raw(folder: Path) -> None:
    """Write 200 records as TinyGSM has them, 4 of GSM8K's form and a tokenizer of characters."""
    with (folder / "raw.jsonl").open("w") as file:
        for n in range(200):
            code = f"def simple_math_problem() -> int:\n    return {n} + 2\n"
            file.write(
                json.dumps({"question": f"Ann has {n} pens and buys 2. How many?", "code": code}) + "\n"
            )
    with (folder / "gsm8k.jsonl").open("w") as file:
        for n in range(4):
            file.write(
                json.dumps({"question": f"Bob has {n}0 cats. How many?", "answer": f"#### {n}0"}) + "\n"
            )
    characters = {chr(code): place for place, code in enumerate([10, *range(32, 127)])}
    tokenizer = Tokenizer(WordLevel(characters, unk_token=" "))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_recipe_from_raw_records_to_a_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one command prepares and plans the chain; then what its jobs run, in this process."""
    write_raw(tmp_path)
    inputs = [str(tmp_path / name) for name in ("raw.jsonl", "gsm8k.jsonl", "tokenizer.json")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    plan = subprocess.run(
        [str(ROOT / "slurm/tinygsm.sh"), *inputs, "--set", f"run_dir={tmp_path / 'run'}", "--dry-run"],
        capture_output=True,
        text=True,
        env=os.environ | {"DATA": str(tmp_path / "data"), "PATH": path},
    )
    assert plan.returncode == 0, plan.stderr
    data = tmp_path / "data"
    for stage in ("preprocess", "merge", "pretrain", "evaluate", "export"):
        assert f"slurm/{stage}.sbatch" in plan.stdout
    corpus = [
        "--input",
        str(data / "tinygsm/train.jsonl"),
        "--prompt-key",
        "prompt",
        "--answer-key",
        "answer",
    ]
    scoring = ["--task", "gsm8k-program", "--data", inputs[1], "--tokens-per-step", "2"]
    assert " ".join(corpus) in plan.stdout
    assert " ".join(scoring) in plan.stdout

    tokenizer = str(data / "qwen2_tokenizer")
    place = ["--tokenizer", tokenizer, "--output-prefix", str(data / "tinygsm_pairs"), "--workers", "1"]
    assert run_here(preprocess_data.main, [*corpus, *place], capsys).code == 0
    settings = [
        "--config",
        str(ROOT / "configs/tinygsm_125m.yaml"),
        "--run_dir",
        str(tmp_path / "run"),
        *TINY,
    ]
    files = ["--data.tokenizer", tokenizer, "--data.prefixes", f"[{data / 'tinygsm_pairs'}]"]
    trained = run_here(train.main, [*settings, *files], capsys)
    assert trained.code == 0, trained.error
    output = tmp_path / "scores.json"
    asked = ["--checkpoint", str(tmp_path / "run"), *scoring, "--output", str(output)]
    scored = run_here(evaluate.main, asked, capsys)
    assert scored.code == 0, scored.error
    assert len(json.loads(output.read_text())["items"]) == 4
