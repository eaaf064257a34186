"""Tasks: reading of items, and judging of answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.base.errors import UserError
from pipeline.evaluation.tasks import TASKS, Item, Verdict
from pipeline.evaluation.tasks.gsm8k import FinalNumber, Program, final_number

QUESTIONS = [
    ("A baker sells 3 trays of 12 rolls. How many?", "He sells 3*12=<<3*12=36>>36 rolls.\n#### 36"),
    ("A house cost $1,200,000 and lost 5%. How much is lost?", "5% of it is lost.\n#### 60,000"),
    ("From 3 degrees it falls by 10. What is it then?", "3 - 10 = <<3-10=-7>>-7\n#### -7"),
    ("Two share 5 litres. How much has each?", "5/2 = <<5/2=2.5>>2.5\n#### 2.5"),
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    return write(tmp_path / "gsm8k.jsonl", [{"question": q, "answer": a} for q, a in QUESTIONS])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("so 5, no, 6\n#### 72 apples in 3 days", "72"),
        ("#### 1\nor rather\n#### 2", "2"),
        ("It costs $1,234.50.", "1234.50"),
        ("The answer is 72.00.", "72"),
        ("#### -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−2 degrees", "-2"),
        ("10-5", "5"),
        ("x = 3-10 = -7", "-7"),
        ("(-3)", "-3"),
        ("€ 12,345,678", "12345678"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("50%", "50"),
        (".5", "0.5"),
        ("no idea", None),
        ("3 and then ####", None),
        ("", None),
    ],
)
def test_the_number_of_a_text(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_every_reference_is_right_against_itself(gsm8k: Path) -> None:
    task = FinalNumber()
    items = task.read(gsm8k)
    assert [item.prompt for item in items] == [question for question, _ in QUESTIONS]
    assert all(task.score(item, item.reference).right for item in items)
    for item, number in zip(items, [36.0, 60000.0, -7.0, 2.5], strict=True):
        assert task.score(item, f"The answer is {number}") == Verdict(True, str(number))
        assert not task.score(item, f"#### {number + 1}").right
    assert task.score(items[0], "?") == Verdict(False, "no number")


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    task = Program()
    yield task
    task.close()


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("rolls = 3 * 12\n    return rolls", True),
        ("return 36.0", True),
        ("return 0.1 * 3 * 120", True),  # 36.00000000000001
        ("return '36'", True),
        ("return 36.001", False),
        ("return -36", False),
        ("return None", False),
        ("return True", False),
        ("return float('nan')", False),
        ("return '1e999999999'", False),
        ("return '72/2'", True),  # a Fraction, as text
        ("return '36/0'", False),
        ("return '/'", False),
        ("return '9' * 4000", False),
        ("print(36)", False),
        ("return rolls", False),
    ],
)
def test_programs_are_run(program: Program, gsm8k: Path, body: str, right: bool) -> None:
    text = f"def simple_math_problem() -> int:\n    '''{QUESTIONS[0][0]}'''\n    {body}\n"
    [item, *_] = program.read(gsm8k)
    assert program.score(item, text).right is right
    assert program.score(item, f"Here it is:\n```python\n{text}```\nDone.").right is right


def test_why_a_program_failed(program: Program) -> None:
    item = Item("?", "#### 1")
    assert program.score(item, "def f(): return 1 / 0").found == "ZeroDivisionError: division by zero"
    assert program.score(item, "return 1").found.startswith("SyntaxError")


def test_exact_answers() -> None:
    task = TASKS["exact"]()
    item = Item("p", " two  words\n")
    assert task.score(item, "two\twords") == Verdict(True, "two words")
    assert not task.score(item, "twowords").right
    assert not task.score(item, "Two words").right


def test_sudoku_is_judged_by_the_rules(tmp_path: Path) -> None:
    """Any solution is right, even if the file has another; a grid that breaks a clue or a rule is wrong."""
    solution = "1234341221434321"
    path = write(tmp_path / "puzzles.jsonl", [{"prompt": "12" + "0" * 14, "answer": "x"}])
    task = TASKS["sudoku"]()
    [item] = items = task.read(path)
    assert task.answer_length(items) == 16
    assert task.score(item, solution).right
    assert task.score(item, "2134342112434312").right is False  # a valid grid, another clue
    assert task.score(item, solution[:-1] + "2").right is False
    assert task.score(item, solution + "1").right is False
    assert task.summary(1, 3) == "solved 0.33 of 3 held-out puzzles"


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("sudoku", [{"prompt": "123", "answer": "1"}], r"line 1: '123' is no puzzle: make some"),
        ("sudoku", [{"prompt": "5" * 16, "answer": "1"}], "is no puzzle"),
        (
            "sudoku",
            [{"prompt": "0" * 16, "answer": "1"}, {"prompt": "0" * 36, "answer": "1"}],
            "line 2: a puzzle of 6x6 among others",
        ),
        ("gsm8k-number", [{"question": "q", "answer": "7"}], "line 1: .* does not end in '#### NUMBER'"),
        pytest.param(
            *("gsm8k-program", [{"question": "q", "answer": "#### x"}], "does not end in '#### NUMBER'"),
            marks=pytest.mark.slow,
        ),
        ("gsm8k-number", [{"prompt": "q", "answer": "7"}], "line 1: no key 'question'.*--prompt-key"),
        ("exact", [], "holds no items"),
    ],
)
def test_files_that_are_no_items(tmp_path: Path, name: str, rows: list[dict[str, str]], message: str) -> None:
    path = write(tmp_path / "items.jsonl", rows)
    task = TASKS[name]()
    with pytest.raises(UserError) as caught:
        task.read(path)
    task.close()
    assert re.search(message, str(caught.value))
    assert str(path) in str(caught.value)
