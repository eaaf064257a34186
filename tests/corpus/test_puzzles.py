"""Sudoku: the rules against slow oracles written differently, the split, and the tool as users run it."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from pipeline.corpus.recipes import puzzles

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
SIZES = sorted(BOX)
CLUES = {4: 6, 6: 14, 9: 32}


def complete_sets(grids: np.ndarray) -> np.ndarray:
    """Return for each grid [..., size, size] whether all rows, columns and boxes hold 1..size."""
    size = grids.shape[-1]
    height, width = BOX[size]
    blocks = grids.reshape(-1, size // height, height, size // width, width).swapaxes(2, 3)
    views = np.stack([grids, grids.swapaxes(-1, -2), blocks.reshape(grids.shape)])
    return (np.sort(views, axis=-1) == np.arange(1, size + 1)).all(axis=(0, -1, -2))


def as_array(text: str, size: int) -> np.ndarray:
    return np.array([int(c) for c in text]).reshape(1, size, size)


def all_4x4() -> np.ndarray:
    """Return every solved 4x4 grid, [288, 16], by trying all rows that are permutations."""
    rows = np.array(list(itertools.permutations(range(1, 5))))
    chosen = np.array(list(itertools.product(range(24), repeat=4)))
    grids = rows[chosen]
    return grids[complete_sets(grids)].reshape(-1, 16)


GRIDS = all_4x4()
GRID_TEXTS = {"".join(map(str, grid)) for grid in GRIDS}


def matching_4x4(puzzle: str) -> np.ndarray:
    """Return the solved 4x4 grids, [n, 16], that keep the clues of a puzzle."""
    clues = np.array([int(c) for c in puzzle])
    return GRIDS[((clues == 0) | (clues == GRIDS)).all(axis=1)]


def exact_covers(puzzle: str, size: int, limit: int) -> int:
    """Count solutions as exact covers (Knuth's Algorithm X with sets), up to `limit`."""
    height, width = BOX[size]
    choices = {}
    for row, column, digit in itertools.product(range(size), range(size), "123456789"[:size]):
        if puzzle[row * size + column] in ("0", digit):
            block = (row // height, column // width)
            choices[row, column, digit] = [
                ("cell", row, column),
                ("row", row, digit),
                ("column", column, digit),
                ("box", block, digit),
            ]
    wanted = {(kind, a, b) for kind in ("row", "column") for a in range(size) for b in "123456789"[:size]}
    wanted |= {("cell", a, b) for a in range(size) for b in range(size)}
    wanted |= {
        ("box", (a, b), digit)
        for a in range(size // height)
        for b in range(size // width)
        for digit in "123456789"[:size]
    }

    def count(open_needs: dict, left: int) -> int:
        if not open_needs:
            return 1
        need = min(open_needs, key=lambda each: len(open_needs[each]))
        found = 0
        for choice in sorted(open_needs[need]):
            covered = choices[choice]
            gone = set().union(*(open_needs[each] for each in covered))
            found += count(
                {each: rest - gone for each, rest in open_needs.items() if each not in covered}, left - found
            )
            if found >= left:
                break
        return found

    by_need = {need: {choice for choice, met in choices.items() if need in met} for need in wanted}
    return count(by_need, limit)


def generated(size: int, count: int, seed: int = 0, **changes: object) -> list[tuple[str, str]]:
    arguments = {"clues": CLUES[size], "split": None, "held_out_percent": 10} | changes
    return list(puzzles.generate(size=size, count=count, seed=seed, **arguments))  # type: ignore[arg-type]


def test_boxes_of_every_size() -> None:
    assert {size: puzzles.boxes(size) for size in SIZES} == BOX


@pytest.mark.parametrize("size", [-4, 0, 1, 5, 8, 16])
def test_other_sizes_are_refused(size: int) -> None:
    for refuse in (
        lambda: puzzles.boxes(size),
        lambda: puzzles.random_solution(random.Random(0), size),
        lambda: puzzles.is_solved("", "", size),
        lambda: puzzles.count_solutions("", size),
    ):
        with pytest.raises(UserError, match=rf"size {size} .*\[4, 6, 9\]"):
            refuse()


def test_there_are_288_solved_4x4_grids() -> None:
    assert len(GRIDS) == len(GRID_TEXTS) == 288
    assert puzzles.count_solutions("0" * 16, 4, limit=1000) == 288
    every_row = ["".join(row) for row in itertools.permutations("1234")]
    accepted = {
        "1234" + "".join(rows)
        for rows in itertools.product(every_row, repeat=3)
        if puzzles.is_solved("0" * 16, "1234" + "".join(rows), 4)
    }
    assert accepted == {text for text in GRID_TEXTS if text.startswith("1234")}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from("00000001234"), min_size=16, max_size=16), st.integers(1, 300))
def test_any_4x4_puzzle_is_counted_as_by_enumeration(cells: list[str], limit: int) -> None:
    puzzle = "".join(cells)
    assert puzzles.count_solutions(puzzle, 4, limit) == min(limit, len(matching_4x4(puzzle)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([6, 9]), st.integers(0, 2**32), st.data())
def test_larger_puzzles_are_counted_as_by_exact_covers(size: int, seed: int, data: st.DataObject) -> None:
    rng = random.Random(seed)
    puzzle = list(puzzles.random_solution(rng, size))
    for cell in rng.sample(range(size * size), data.draw(st.integers(0, size * size * 6 // 10))):
        puzzle[cell] = "0"
    if data.draw(st.booleans()):  # a wrong clue may leave no solution at all
        puzzle[data.draw(st.integers(0, size * size - 1))] = data.draw(st.sampled_from("123456789"[:size]))
    text = "".join(puzzle)
    assert puzzles.count_solutions(text, size, 20) == exact_covers(text, size, 20)


def test_a_digit_above_the_size_has_no_solution() -> None:
    assert puzzles.count_solutions("9" + "0" * 15, 4) == 0


@pytest.mark.parametrize("size", SIZES)
def test_random_solutions_obey_the_rules(size: int) -> None:
    rng = random.Random(3)
    solutions = [puzzles.random_solution(rng, size) for _ in range(100)]
    assert all(complete_sets(as_array(solution, size)).all() for solution in solutions)
    assert len(set(solutions)) > 70


def test_random_4x4_solutions_are_roughly_uniform() -> None:
    rng, draws = random.Random(5), 28_800
    counts = Counter(puzzles.random_solution(rng, 4) for _ in range(draws))
    assert set(counts) == GRID_TEXTS
    assert 50 < min(counts.values()) <= max(counts.values()) < 200  # 100 is expected


@pytest.mark.parametrize("clues", [4, 5, 6, 10, 15])
def test_4x4_puzzles_have_one_solution_by_enumeration(clues: int) -> None:
    puzzles = generated(4, 150, clues=clues)
    assert len({puzzle for puzzle, _ in puzzles}) == 150
    for puzzle, solution in puzzles:
        assert sum(c != "0" for c in puzzle) == clues
        assert ["".join(map(str, grid)) for grid in matching_4x4(puzzle)] == [solution]


@pytest.mark.parametrize(("size", "clues", "count"), [(6, 10, 40), (6, 14, 40), (9, 32, 20), (9, 26, 5)])
def test_larger_puzzles_have_one_solution_by_exact_covers(size: int, clues: int, count: int) -> None:
    for puzzle, solution in generated(size, count, clues=clues):
        assert sum(c != "0" for c in puzzle) == clues
        assert all(clue in ("0", digit) for clue, digit in zip(puzzle, solution, strict=True))
        assert complete_sets(as_array(solution, size)).all()
        assert exact_covers(puzzle, size, 2) == 1


def test_a_puzzle_that_cannot_get_so_low_is_none() -> None:
    rng = random.Random(0)
    made = [puzzles.make_puzzle(rng, 4, 4) for _ in range(200)]
    assert None in made
    assert any(made)
    assert [puzzles.make_puzzle(rng, 4, 3) for _ in range(50)] == [None] * 50


def test_a_solution_that_is_not_accepted_is_none() -> None:
    asked: list[str] = []
    assert puzzles.make_puzzle(random.Random(0), 4, 6, lambda grid: bool(asked.append(grid))) is None
    assert len(asked) == 1
    assert asked[0] in GRID_TEXTS


@st.composite
def made_puzzles(draw: st.DrawFn) -> tuple[str, str, int]:
    size = draw(st.sampled_from(SIZES))
    made = puzzles.make_puzzle(random.Random(draw(st.integers(0, 2**32))), size, CLUES[size])
    assert made is not None
    return *made, size


@given(made_puzzles())
@settings(max_examples=50, deadline=None)
def test_the_solution_is_solved(case: tuple[str, str, int]) -> None:
    puzzle, solution, size = case
    assert puzzles.is_solved(puzzle, solution, size)


def test_any_valid_grid_that_keeps_the_clues_is_solved() -> None:
    puzzle = "12" + "0" * 14
    solved = {text for text in GRID_TEXTS if puzzles.is_solved(puzzle, text, 4)}
    assert solved == {text for text in GRID_TEXTS if text.startswith("12")}
    assert len(solved) == 24


@given(made_puzzles(), st.text() | st.text(st.sampled_from("0123456789 \n١１²④a-"), min_size=14, max_size=18))
@settings(max_examples=300, deadline=None)
def test_garbage_is_not_solved(case: tuple[str, str, int], answer: str) -> None:
    puzzle, solution, size = case
    assert puzzles.is_solved(puzzle, answer, size) == (answer == solution)


@pytest.mark.parametrize("one", ["１", "١", "¹", "①", "Ⅰ", "一", "I", "l", "+1", "\x001"])
def test_look_alikes_of_a_digit_are_not_solved(one: str) -> None:
    solution = "1234341221434321"
    assert puzzles.is_solved("0" * 16, solution, 4)
    assert not puzzles.is_solved("0" * 16, solution.replace("1", one, 1), 4)


@given(made_puzzles(), st.data())
@settings(max_examples=300, deadline=None)
def test_any_corruption_of_a_cell_is_not_solved(case: tuple[str, str, int], data: st.DataObject) -> None:
    puzzle, solution, size = case
    cell = data.draw(st.integers(0, size * size - 1))
    replacement = data.draw(st.sampled_from("0123456789") | st.characters())
    if replacement != solution[cell]:
        assert not puzzles.is_solved(puzzle, solution[:cell] + replacement + solution[cell + 1 :], size)
    assert not puzzles.is_solved(puzzle, solution[:cell] + solution[cell + 1 :], size)
    assert not puzzles.is_solved(puzzle, solution[:cell] + replacement + solution[cell:], size)


@given(made_puzzles(), st.data())
@settings(max_examples=200, deadline=None)
def test_swapped_cells_are_not_solved(case: tuple[str, str, int], data: st.DataObject) -> None:
    puzzle, solution, size = case
    a, b = data.draw(st.lists(st.integers(0, size * size - 1), min_size=2, max_size=2, unique=True))
    cells = list(solution)
    cells[a], cells[b] = cells[b], cells[a]
    assert puzzles.is_solved(puzzle, "".join(cells), size) == (solution[a] == solution[b])


@given(made_puzzles(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_valid_grid_that_breaks_a_clue_is_not_solved(
    case: tuple[str, str, int], data: st.DataObject
) -> None:
    puzzle, solution, size = case
    digits = "123456789"[:size]
    renamed = solution.translate(
        str.maketrans(digits, "".join(data.draw(st.permutations(digits))))
    )  # as valid as the solution, but with clues permuted
    assert complete_sets(as_array(renamed, size)).all()
    assert puzzles.is_solved("0" * size * size, renamed, size)
    assert puzzles.is_solved(puzzle, renamed, size) == (renamed == solution)


def test_the_split_of_a_grid_never_changes() -> None:
    """The bucket of this grid is sha256(...)[:8] % 100 = 53: files of other versions stay disjoint."""
    grid = "1234341221434321"
    assert puzzles.split_of(grid, 53) == "train"
    assert puzzles.split_of(grid, 54) == "held-out"


def test_a_larger_share_only_adds_held_out_grids() -> None:
    held_out = [
        {grid for grid in GRID_TEXTS if puzzles.split_of(grid, percent) == "held-out"}
        for percent in range(101)
    ]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(held_out))
    assert not held_out[0]
    assert held_out[100] == GRID_TEXTS
    assert 15 <= len(held_out[10]) <= 45  # 28.8 expected


@pytest.mark.parametrize(("size", "count"), [(4, 600), (6, 100)])
def test_no_seed_brings_a_held_out_grid_into_training(size: int, count: int) -> None:
    train, held_out = (
        {grid for seed in range(4) for _, grid in generated(size, count + seed, seed=seed, split=split)}
        for split in ("train", "held-out")
    )
    assert not train & held_out
    assert {puzzles.split_of(grid, 10) for grid in train} == {"train"}
    assert {puzzles.split_of(grid, 10) for grid in held_out} == {"held-out"}
    if size == 4:
        assert train | held_out == GRID_TEXTS


@pytest.mark.parametrize("size", SIZES)
def test_the_seed_decides_the_puzzles(size: int) -> None:
    first = generated(size, 20, seed=1)
    assert first == generated(size, 30, seed=1)[:20]
    assert not set(first) & set(generated(size, 20, seed=2)) or size == 4


def test_the_puzzles_of_a_seed_are_the_same_everywhere() -> None:
    """Recorded once: another version of Python must not make other data."""
    assert generated(6, 1, seed=1)[0] == (
        "300604000500043006001040100000064013",
        "315624426531243156651342132465564213",
    )


def test_nothing_is_made_before_the_arguments_are_checked() -> None:
    with pytest.raises(UserError, match="--clues is 3"):
        puzzles.generate(4, 1, 3, 0, None, 10)


def make(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "make_sudoku.py"), "--output", str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=output.anchor, check=False)


def test_tool_writes_the_same_lines_again(tmp_path: Path) -> None:
    first, again = tmp_path / "new" / "folder" / "a.jsonl", tmp_path / "b.jsonl"
    for path in (first, again):
        done = make(path, "--size", "4", "--count", "200", "--seed", "7", "--split", "held-out")
        assert (done.returncode, done.stderr) == (EXIT_DONE, "")
        assert done.stdout == f"wrote 200 puzzles of 4x4 with 6 clues to {path}\n"
    assert first.read_bytes() == again.read_bytes()
    assert list(first.parent.iterdir()) == [first]
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert [(line["prompt"], line["answer"]) for line in lines] == generated(4, 200, seed=7, split="held-out")
    assert all(set(line) == {"prompt", "answer"} for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--size 5 --count 1", "--size.* 5 .*4, 6, 9"),
        ("--size 4 --count 0", "--count is 0: .* 1 or more"),
        ("--size 4 --count 1 --clues 3", "--clues is 3: choose from 4 to 15"),
        ("--size 6 --count 1 --clues 7", "--clues is 7: choose from 8 to 35"),
        ("--size 9 --count 1 --clues 16", "--clues is 16: choose from 17 to 80"),
        ("--size 9 --count 1 --clues 81", "--clues is 81: choose from 17 to 80"),
        ("--size 4 --count 1 --held-out-percent 100", "--held-out-percent is 100: .* 1 to 99"),
        ("--size 4 --count 1 --seeds 3", "'--seeds'.* Did you mean '--seed'"),
        (
            "--size 4 --count 800 --clues 15 --split held-out",
            "--count is 800, .*after [0-9]+ .*lower --count, or change --held-out-percent, now 10",
        ),
    ],
)
def test_tool_says_what_is_wrong_in_one_line(tmp_path: Path, arguments: str, message: str) -> None:
    output = tmp_path / "puzzles.jsonl"
    output.write_text("kept")
    done = make(output, *arguments.split())
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert re.search(message, done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == [output]
    assert output.read_text() == "kept"
