"""Sudoku: the rules, puzzles with one solution, and a split that never lets a held-out grid into training.

A puzzle is a string of size x size digits, row by row, '0' for an empty cell; a solution has no '0'.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from pipeline.cli import UserError

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
# The fewest clues with which a puzzle can have one solution.
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}
DEFAULT_CLUES = {4: 6, 6: 16, 9: 34}
TRIES = 2000

Split = Literal["train", "held-out"]


@lru_cache
def units(size: int) -> tuple[tuple[int, ...], ...]:
    """Return the cells of every row, column and box; raise a `UserError` for a size that is not known."""
    if size not in BOXES:
        raise UserError(f"Sudoku size {size} is not known: choose one of {sorted(BOXES)}.")
    height, width = BOXES[size]
    rows = [tuple(range(r * size, (r + 1) * size)) for r in range(size)]
    columns = [tuple(range(c, size * size, size)) for c in range(size)]
    boxes = [
        tuple((top + r) * size + left + c for r in range(height) for c in range(width))
        for top in range(0, size, height)
        for left in range(0, size, width)
    ]
    return tuple(rows + columns + boxes)


@lru_cache
def _units_of_cell(size: int) -> tuple[tuple[int, int, int], ...]:
    """Return the row, column and box numbers of every cell."""
    all_units = units(size)
    return tuple(
        tuple(number for number, unit in enumerate(all_units) if cell in unit)  # type: ignore[misc]
        for cell in range(size * size)
    )


def is_solved(puzzle: str, answer: str, size: int) -> bool:
    """Say whether every row, column and box of `answer` holds each digit once and every clue is kept.

    Any string may be given as an answer; one that is no grid is not solved.
    """
    digits = "".join(str(digit) for digit in range(1, size + 1))
    if len(answer) != size * size or any(a not in digits for a in answer):
        return False
    if any(clue not in ("0", cell) for clue, cell in zip(puzzle, answer, strict=True)):
        return False
    return all(len({answer[cell] for cell in unit}) == size for unit in units(size))


def solutions(puzzle: str, size: int, rng: random.Random | None = None) -> Iterator[str]:
    """Yield the solutions of a puzzle, in an order drawn from `rng` where it is given."""
    cell_units = _units_of_cell(size)
    used = [0] * (3 * size)  # the digits of each unit, as bits
    grid = [int(c) for c in puzzle]
    for cell, digit in enumerate(grid):
        bit = 1 << digit
        if digit and any(used[unit] & bit for unit in cell_units[cell]):
            return
        for unit in cell_units[cell]:
            used[unit] |= bit if digit else 0
    every_digit = (1 << (size + 1)) - 2
    yield from _fill(
        grid, [c for c, digit in enumerate(grid) if not digit], used, cell_units, every_digit, rng
    )


def _fill(
    grid: list[int],
    empty: list[int],
    used: list[int],
    cell_units: tuple[tuple[int, int, int], ...],
    every_digit: int,
    rng: random.Random | None,
) -> Iterator[str]:
    """Fill the cell with the fewest possible digits, and go on from there."""
    if not empty:
        yield "".join(map(str, grid))
        return
    fewest, best, options = 99, 0, 0
    for position, cell in enumerate(empty):
        row, column, box = cell_units[cell]
        possible = every_digit & ~(used[row] | used[column] | used[box])
        count = possible.bit_count()
        if count < fewest:
            fewest, best, options = count, position, possible
            if count <= 1:
                break
    if fewest == 0:
        return
    cell = empty[best]
    rest = empty[:best] + empty[best + 1 :]
    digits = [digit for digit in range(1, every_digit.bit_length()) if options >> digit & 1]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        bit = 1 << digit
        grid[cell] = digit
        for unit in cell_units[cell]:
            used[unit] ^= bit
        yield from _fill(grid, rest, used, cell_units, every_digit, rng)
        for unit in cell_units[cell]:
            used[unit] ^= bit
    grid[cell] = 0


def has_one_solution(puzzle: str, size: int) -> bool:
    """Say whether the puzzle has exactly one solution."""
    found = solutions(puzzle, size)
    return next(found, None) is not None and next(found, None) is None


def random_solution(rng: random.Random, size: int) -> str:
    """Return a random full grid."""
    return next(solutions("0" * size * size, size, rng))


def make_puzzle(rng: random.Random, solution: str, size: int, clues: int) -> str | None:
    """Return a puzzle with exactly `clues` clues whose one solution is `solution`.

    Cells are emptied in random order as long as the solution stays the only one; None when that ends before
    the puzzle has so few clues.
    """
    cells = list(range(size * size))
    rng.shuffle(cells)
    puzzle, left = list(solution), size * size
    for cell in cells:
        if left == clues:
            break
        digit, puzzle[cell] = puzzle[cell], "0"
        if has_one_solution("".join(puzzle), size):
            left -= 1
        else:
            puzzle[cell] = digit
    return "".join(puzzle) if left == clues else None


def split_of(solution: str, held_out_percent: int) -> Split:
    """Return the split of a grid, by its hash.

    All puzzles of a grid are in one split, so that no held-out puzzle, nor even its solution, is ever trained
    on, whatever the seeds and counts of the files.
    """
    bucket = int.from_bytes(hashlib.sha256(solution.encode()).digest()[:8], "big") % 100
    return "held-out" if bucket < held_out_percent else "train"


def generate(
    size: int, count: int, clues: int, seed: int, split: Split | None, held_out_percent: int
) -> Iterator[tuple[str, str]]:
    """Yield `count` different puzzles with their solutions, the same ones for the same arguments.

    Raises:
        UserError: for arguments that no puzzle fits, or when no new puzzle is found in many tries.
    """
    units(size)
    if count < 1:
        raise UserError(f"--count is {count}: it must be 1 or more.")
    if not FEWEST_CLUES[size] <= clues < size * size:
        raise UserError(
            f"--clues is {clues}: a {size}x{size} puzzle with one solution has {FEWEST_CLUES[size]} to "
            f"{size * size - 1} clues."
        )
    if not 0 < held_out_percent < 100:
        raise UserError(f"--held-out-percent is {held_out_percent}: it must be from 1 to 99.")
    rng, tries = random.Random(seed), 0
    seen: set[str] = set()
    while len(seen) < count:
        tries += 1
        if tries > TRIES:
            raise UserError(
                f"only {len(seen)} different {size}x{size} puzzles with {clues} clues were found in "
                f"{TRIES} tries for another: lower --count = {count}, or raise --clues."
            )
        solution = random_solution(rng, size)
        if split is not None and split_of(solution, held_out_percent) != split:
            continue
        puzzle = make_puzzle(rng, solution, size, clues)
        if puzzle is not None and puzzle not in seen:
            seen.add(puzzle)
            tries = 0
            yield puzzle, solution
