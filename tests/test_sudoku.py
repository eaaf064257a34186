"""Sudoku: an answer is solved only by the rules; puzzles have one solution; splits share no grid."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import run_here

from pipeline.evaluation import sudoku
from tools import make_sudoku


def valid_grid(grid: str, size: int) -> bool:
    """Check rows, columns and boxes by sorting slices of an array."""
    cells = np.array([int(c) for c in grid]).reshape(size, size)
    height, width = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    boxes = cells.reshape(size // height, height, size // width, width).swapaxes(1, 2).reshape(size, size)
    digits = np.arange(1, size + 1)
    return all((np.sort(part, axis=1) == digits).all() for part in (cells, cells.T, boxes))


def every_4x4_grid() -> list[str]:
    """Enumerate all grids from permutations of rows, without the solver."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    pairs = [(a, b) for a in rows for b in rows if all(x != y for x, y in zip(a, b, strict=True))]
    return ["".join((*top, *end)) for top in pairs for end in pairs if valid_grid("".join((*top, *end)), 4)]


def test_there_are_288_4x4_grids_and_the_solver_finds_them() -> None:
    grids = every_4x4_grid()
    assert len(grids) == 288
    assert sudoku.count_solutions("0" * 16, 4, limit=1000) == 288
    assert all(sudoku.count_solutions(grid, 4) == 1 for grid in grids)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_puzzles_are_right(size: int) -> None:
    """As many clues as asked, all of the solution, which is valid; no puzzle twice; the same for a seed."""
    clues = sudoku.DEFAULT_CLUES[size]
    made = list(sudoku.generate(size, 30, clues, 5, None, 10))
    assert made == list(sudoku.generate(size, 30, clues, 5, None, 10))
    assert made != list(sudoku.generate(size, 30, clues, 6, None, 10))
    assert len({puzzle for puzzle, _ in made}) == 30
    for puzzle, solution in made:
        assert valid_grid(solution, size)
        assert sum(c != "0" for c in puzzle) == clues
        assert all(c in ("0", s) for c, s in zip(puzzle, solution, strict=True))
        assert sudoku.is_solved(puzzle, solution, size)


def test_puzzles_have_one_solution() -> None:
    """Counted among all 288 grids of size 4."""
    grids = every_4x4_grid()
    for puzzle, _ in sudoku.generate(4, 100, 5, 0, None, 10):
        fitting = [g for g in grids if all(c in ("0", d) for c, d in zip(puzzle, g, strict=True))]
        assert len(fitting) == 1
    assert sudoku.count_solutions("1" + "0" * 15, 4, limit=1000) == 288 / 4
    assert sudoku.count_solutions("11" + "0" * 14, 4) == 0


@given(st.text(max_size=20))
def test_no_answer_crashes_the_scorer(answer: str) -> None:
    assert sudoku.is_solved("0" * 16, answer, 4) == (
        len(answer) == 16 and set(answer) <= set("1234") and valid_grid(answer, 4)
    )


@given(st.integers(0, 35), st.sampled_from("0123456789٣ x"), st.integers(0, 10**6))
def test_one_wrong_cell_is_not_solved(cell: int, digit: str, seed: int) -> None:
    solution = sudoku.random_solution(random.Random(seed), 6)
    broken = solution[:cell] + digit + solution[cell + 1 :]
    assert sudoku.is_solved("0" * 36, broken, 6) == (broken == solution)
    assert not sudoku.is_solved("0" * 36, solution[:-1], 6)
    assert not sudoku.is_solved("0" * 36, solution + "1", 6)


def test_a_valid_grid_that_changes_a_clue_is_not_solved() -> None:
    one, other = every_4x4_grid()[:2]
    assert sudoku.is_solved("0" * 16, other, 4)
    assert not sudoku.is_solved(one, other, 4)


def test_splits_share_no_grid() -> None:
    """Whatever the seeds; and the shares are about as asked."""
    grids = {
        split: {s for seed in (1, 2) for _, s in sudoku.generate(4, 400, 6, seed, split, 20)}
        for split in ("train", "held-out")
    }
    assert not grids["train"] & grids["held-out"]
    share = sum(sudoku.split_of(grid, 20) == "held-out" for grid in every_4x4_grid()) / 288
    assert 0.1 < share < 0.3


def test_the_tool_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "x.jsonl"
    outcome = run_here(
        make_sudoku.main, ["--size", "4", "--count", "7", "--seed", "1", "--output", str(output)], capsys
    )
    assert outcome.code == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 7
    assert all(set(line) == {"prompt", "answer"} for line in lines)
    assert [p.name for p in output.parent.iterdir()] == ["x.jsonl"], "nothing temporary is left"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--size", "5", "--count", "1"], ["--size", "5"]),
        (["--size", "4", "--count", "0"], ["--count is 0"]),
        (["--size", "4", "--count", "1", "--clues", "3"], ["--clues is 3", "4 to 15"]),
        (["--size", "4", "--count", "1", "--clues", "16"], ["--clues is 16"]),
        (["--size", "4", "--count", "1", "--held-out-percent", "100"], ["--held-out-percent is 100"]),
        (["--size", "4", "--count", "1", "--clue", "8"], ["'--clue'", "'--clues'"]),
        (["--size", "4", "--count", "99999", "--clues", "15"], ["--count is 99999", "different"]),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    output = tmp_path / "x.jsonl"
    complaint = run_here(make_sudoku.main, [*arguments, "--output", str(output)], capsys).complaint()
    for part in parts:
        assert part in complaint
    assert not list(tmp_path.iterdir()), "a failed run leaves nothing"
