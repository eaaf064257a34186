"""The tasks of the comparison: what they make, and each of the new ones once in small."""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fetch_text, pilot, reproduce
from benchmarks.reproduction.curves import read_scores
from benchmarks.reproduction.problems import compositions, problems
from benchmarks.reproduction.sums import chain_of, draw_sums
from support.programs import run_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_trainings")]

TINY = """
    model.layers=1 model.hidden_size=32 model.heads=4 schedule.warmup_steps=1 train.log_interval=1
    monitor.texts=0 train.global_batch_size=8 train.micro_batch_size=8
"""


def longest_chain(a: int, b: int, digits: int) -> int:
    """Return the length of the longest carry chain by the carries into and out of each position."""
    longest = running = 0
    for place in range(digits):
        unit = 10**place
        out = a % (10 * unit) + b % (10 * unit) >= 10 * unit
        alone = a // unit % 10 + b // unit % 10 >= 10
        running = 0 if not out else 1 if alone else running + 1
        longest = max(longest, running)
    return longest


def test_sums_and_their_carry_chains() -> None:
    hard = draw_sums(2, 50, 5, range(4, 6))
    for prompt, answer in draw_sums(1, 300, 5) + hard:
        a, b = map(int, prompt.removesuffix("=").split("+"))
        assert (len(prompt), answer) == (12, str(a + b).zfill(6))
        assert chain_of(prompt) == longest_chain(a, b, 5), prompt
    assert all(longest_chain(*map(int, prompt[:-1].split("+")), 5) >= 4 for prompt, _ in hard)


def test_word_problems_are_solved_by_their_programs() -> None:
    train, held_out = compositions(False), compositions(True)
    assert min(len(train) - 1000, len(held_out) - 100) > 0
    assert not set(train) & set(held_out)
    for side in (False, True):
        source = problems(3, side)
        for _ in range(100):
            question, program, value = next(source)
            names: dict[str, Any] = {}
            exec(program, names)
            assert names["simple_math_problem"]() == value
            assert re.findall(r"\d+", question) == re.findall(r"\d+", program)


def test_the_texts_of_a_package(tmp_path: Path) -> None:
    """English texts, packed or not; translations and other files are left out."""
    contents = {"a.rst": b"one", "b/c.txt": b"two", "translations/it/a.rst": b"uno", "d.svg": b""}
    for name, content in (contents | {"e.rst.gz": gzip.compress(b"three")}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert sorted(fetch_text.documents(tmp_path)) == [("one",), ("three",), ("two",)]


def write_texts(path: Path) -> list[str]:
    """Write 30 documents of 200 words each; return their texts."""
    rng = random.Random(0)
    known = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(60)]
    texts = [" ".join(rng.choices(known, k=200)) for _ in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.mark.parametrize(
    ("task", "sizes", "scores"),
    [
        ("addition", "--count 500", ["easy_1", "hard_1", "easy_2", "hard_2"]),
        ("tinygsm", "--count 3000 --vocabulary 500", ["right_2", "right_1"]),
        ("text", "--held-out 5 --vocabulary 300", ["infill_1", "infill_4"]),
    ],
)
def test_a_task_in_small(
    task: str, sizes: str, scores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two points of a curve by an objective that switches; what is held out is not trained on."""
    table, corpus = tmp_path / "scores.csv", tmp_path / "corpus.jsonl"
    texts = write_texts(corpus)
    arguments = ["--task", task, *sizes.split(), "--variants", "random_then_puma", "--seeds", "5"]
    arguments += "--items 8 --curve-items 4 --steps 6 --interval 3".split()
    arguments += ["--input", str(corpus)] if task == "text" else []
    places = ["--folder", str(tmp_path / "runs"), "--output", str(table)]
    outcome = run_here(reproduce.main, [*arguments, *places, "--set", *TINY.split()], capsys)
    assert outcome.code == 0, outcome.error
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["items"]) for row in rows] == [("3", "4"), ("6", "8")]
    assert all(0 <= float(rows[1][score]) <= 1 for score in scores)
    assert "switch_step: 5\n" in (tmp_path / "runs/random_then_puma_5/config.yaml").read_text()
    held_out = (tmp_path / "runs/held_out.jsonl").read_text().splitlines()
    assert len(held_out) == 8
    if task == "text":
        for line in held_out:
            piece = json.loads(line)["text"]
            assert [piece in text for text in texts].index(True) >= 25
    else:
        assert not set(held_out) & set(
            (tmp_path / "runs").glob("**/train.jsonl").__next__().read_text().splitlines()
        )


def test_a_pilot_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Objectives side by side on the settings of a run; the best held-out loss is first."""
    data = tmp_path / "data"
    sums = [
        "--task",
        "addition",
        "--count",
        "2000",
        "--items",
        "2",
        "--curve-items",
        "2",
        "--variants",
        "random",
    ]
    sums += ["--steps", "1", "--interval", "1", "--seeds", "5", "--folder", str(data)]
    sums += ["--output", str(tmp_path / "scores.csv"), "--set", *TINY.split(), "schedule.warmup_steps=0"]
    made = run_here(reproduce.main, sums, capsys)
    assert made.code == 0, made.error
    arguments = ["--config", str(data / "random_5/config.yaml"), "--steps", "10", "--seeds", "5"]
    arguments += ["--variants", "configured", "puma", "--folder", str(tmp_path / "pilot")]
    arguments += ["--also", "muon", "--optimizer.kind muon", "--output", str(tmp_path / "curves.csv")]
    outcome = run_here(pilot.main, [*arguments, "--set", "data.split=90,10,0"], capsys)
    assert outcome.code == 0, outcome.error
    head, _, *rows = outcome.output.splitlines()
    assert head == "| objective | seeds | held-out loss | tokens/s |"
    cells = [row.split(" | ") for row in rows]
    assert {name for name, *_ in cells} == {"| configured", "| puma", "| muon"}
    assert 0 < float(cells[0][2]) <= float(cells[1][2]) <= float(cells[2][2]) < 4
    _, runs = read_scores(tmp_path / "curves.csv")
    last = {f"| {name}": f"{seeds['5'][-1]['held_out_loss']:.3f}" for name, seeds in runs.items()}
    assert last == {name: loss for name, _, loss, _ in cells}
    ran = (tmp_path / "pilot/configured_5/config.yaml").read_text()
    assert "kind: random_masking\n" in ran
    assert "kind: puma\n" in (tmp_path / "pilot/puma_5/config.yaml").read_text()
    muon = (tmp_path / "pilot/muon_5/config.yaml").read_text()
    assert "kind: muon\n" in muon
    assert "kind: random_masking\n" in muon
