"""What of TinyGSM is trained on, and the way from its raw file to an evaluated model."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from pipeline.corpus.recipes.tinygsm import Selection, defines_a_function
from support.programs import run_here
from tools import prepare_tinygsm

pytestmark = pytest.mark.slow

CODE = "def simple_math_problem() -> int:\n    return {}\n"
BENCHMARK = (
    "Tom has 3 red apples and 4 green apples in each of his 5 large baskets. How many apples are there?"
)


def question(number: int) -> str:
    """Return a question that shares no 13 words in a row with another."""
    chance = random.Random(number)
    return " ".join(f"word{chance.randrange(10**6)}" for _ in range(20)) + f"? {number}"


def write(path: Path, records: list[dict[str, str]]) -> Path:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict[str, str]]:
    """Read a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("code", "is_one"),
    [
        (CODE.format(1), True),
        ("import math\n" + CODE.format("math.pi"), True),
        ("x = 1", False),
        ("def f(:\n", False),
        ("def f():\n    return '\\d'\n", True),
        ("x = \0", False),
        ("(" * 5000, False),
    ],
)
def test_only_python_functions_are_programs(code: str, is_one: bool) -> None:
    assert defines_a_function(code) is is_one


def test_every_record_is_accounted_for() -> None:
    """Each reason with an example that has no other."""
    selection = Selection([BENCHMARK], held_out_share=0.0)
    copied = "First: " + BENCHMARK.upper().replace(".", "!") + " And why?"
    for asked, code, wanted in [
        (question(1), CODE.format(1), "train"),
        (question(1), CODE.format(2), "train"),
        (question(1).upper(), CODE.format(1) + "\n", None),
        ("?!", CODE.format(1), None),
        (question(2), "print(1)", None),
        (copied, CODE.format(1), None),
        (" ".join(BENCHMARK.split()[:12]), CODE.format(1), "train"),
    ]:
        assert selection.part(asked, code) == wanted, asked
    assert selection.counts == {
        "train": 3, "duplicate": 1, "empty question": 1, "no Python function": 1, "in the benchmark": 1,
    }  # fmt: skip


def test_a_question_is_on_one_side_in_any_order() -> None:
    records = [(question(n % 400), CODE.format(n)) for n in range(2000)]
    sides = []
    for order in (records, records[::-1]):
        selection = Selection([], held_out_share=0.1)
        parts = [(asked, code, selection.part(asked, code)) for asked, code in order]
        sides.append({(asked, code): part for asked, code, part in parts})
    assert sides[0] == sides[1]
    held_out = {asked for (asked, _), part in sides[0].items() if part == "held_out"}
    assert not held_out & {asked for (asked, _), part in sides[0].items() if part == "train"}
    assert 20 <= len(held_out) <= 62  # 40 of 400; 6 standard deviations of 3.7 hash values


def test_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw records in, prompts and answers out, with the counts; a bad line is counted."""
    raw = write(
        tmp_path / "raw.jsonl", [{"question": question(n), "code": CODE.format(n)} for n in range(300)]
    )
    with raw.open("a") as file:
        file.write("{broken\n")
    benchmark = write(tmp_path / "gsm8k.jsonl", [{"question": question(7), "answer": "#### 7"}])
    arguments = ["--input", str(raw), "--benchmark", str(benchmark), "--output", str(tmp_path / "out")]
    outcome = run_here(prepare_tinygsm.main, [*arguments, "--held-out-share", "0.1"], capsys)
    assert outcome.code == 0, outcome.error
    train, held_out = read(tmp_path / "out/train.jsonl"), read(tmp_path / "out/held_out.jsonl")
    assert len(train) + len(held_out) == 299
    assert {"prompt": question(8), "answer": CODE.format(8)} in train + held_out
    assert question(7) not in {record["prompt"] for record in train + held_out}
    counts = json.loads((tmp_path / "out/counts.json").read_text())
    assert counts.pop("in the benchmark") == 1
    assert (counts.pop("train"), counts.pop("held_out")) == (len(train), len(held_out))
    assert list(counts.values()) == [1], "the broken line, by its reason"


def test_a_damaged_file_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The records behind the damage would be missing, and nobody would know."""
    raw = write(
        tmp_path / "raw.jsonl", [{"question": question(n), "code": CODE.format(n)} for n in range(300)]
    )
    cut_off = tmp_path / "raw.jsonl.gz"
    cut_off.write_bytes(gzip.compress(raw.read_bytes())[:-900])
    arguments = ["--input", str(cut_off), "--output", str(tmp_path / "out")]
    complaint = run_here(prepare_tinygsm.main, arguments, capsys).complaint()
    assert "it ends before the end of its compressed stream" in complaint
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_nothing_to_train_on_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write(tmp_path / "raw.jsonl", [{"question": "a?", "code": "1"}])
    outcome = run_here(prepare_tinygsm.main, ["--input", str(raw), "--output", str(tmp_path / "out")], capsys)
    assert "nothing to train on" in outcome.complaint()
    assert not list((tmp_path / "out").glob("*.jsonl"))
