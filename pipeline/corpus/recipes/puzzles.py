"""Sudoku: the rules, puzzles with one solution, and a split that never lets a held-out grid into training.

A puzzle is a string of size x size digits, row by row, '0' for an empty cell; a solution has no '0'.
Functions raise a `UserError` for a size other than 4, 6 and 9.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal

from pipeline.base.errors import UserError

# Rows and columns of a box.
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
# Minimum number of clues of a puzzle with one solution.
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}
# Few enough that guessing fails; enough that nearly every grid can be reduced to them.
DEFAULT_CLUES = {4: 6, 6: 14, 9: 32}
# Failures in a row, among grids of the requested split, before a request counts as impossible.
TRIES = 2000

Split = Literal["train", "held-out"]


def boxes(size: int) -> tuple[int, int]:
    """Return the rows and columns of a box of a size x size grid."""
    if size not in BOXES:
        raise UserError(f"Sudoku size {size} is not known: choose one of {sorted(BOXES)}.")
    return BOXES[size]


@lru_cache
def units(size: int) -> tuple[tuple[int, ...], ...]:
    """Return the cells of every row, then of every column, then of every box."""
    height, width = boxes(size)
    rows = [tuple(range(r * size, (r + 1) * size)) for r in range(size)]
    columns = [tuple(range(c, size * size, size)) for c in range(size)]
    blocks = [
        tuple((top + r) * size + left + c for r in range(height) for c in range(width))
        for top in range(0, size, height)
        for left in range(0, size, width)
    ]
    return tuple(rows + columns + blocks)


def is_solved(puzzle: str, answer: str, size: int) -> bool:
    """Say whether every row, column and box of `answer` holds each digit once and every clue is kept.

    Any string may be given as an answer; one that is no grid is not solved.
    """
    all_units = units(size)
    digits = "123456789"[:size]
    if len(answer) != size * size or any(a not in digits for a in answer):
        return False
    if any(clue not in ("0", cell) for clue, cell in zip(puzzle, answer, strict=True)):
        return False
    return all(len({answer[cell] for cell in unit}) == size for unit in all_units)


@lru_cache
def _units_of_cell(size: int) -> tuple[tuple[int, int, int], ...]:
    """Return the numbers of the row, the column and the box of every cell, as `units` counts them."""
    all_units = units(size)
    return tuple(
        tuple(number for number, unit in enumerate(all_units) if cell in unit)  # type: ignore[misc]
        for cell in range(size * size)
    )


class _Filling:
    """The digits in the units of a grid; digit d is the bit 1 << d.

    Attributes:
        used: the digits in each unit, in the order of `units`.
        digits: the digit last tried in each cell.
    """

    def __init__(self, size: int) -> None:
        self.units_of_cell = _units_of_cell(size)
        self.every_digit = (1 << (size + 1)) - 2
        self.used = [0] * (3 * size)
        self.digits = [0] * (size * size)

    def possible(self, cell: int) -> int:
        """Return the digits that no unit of an empty cell has yet, as bits."""
        row, column, box = self.units_of_cell[cell]
        return self.every_digit & ~(self.used[row] | self.used[column] | self.used[box])

    def flip(self, cell: int, digit: int) -> None:
        """Add a digit to the units of a cell, or remove it again."""
        for unit in self.units_of_cell[cell]:
            self.used[unit] ^= 1 << digit

    def search(self, empty: list[int], limit: int, rng: random.Random | None = None) -> int:
        """Return in how many ways the cells `empty` can be filled, counting no further than `limit`.

        Digits are tried in an order drawn from `rng` where it is given. A search that found as many as
        `limit` leaves the last of them in `digits`.
        """
        if not empty:
            return 1
        units_of_cell, used, every_digit = self.units_of_cell, self.used, self.every_digit
        fewest, best, options = 99, 0, 0
        # `possible` inlined: nearly all the time is spent in this loop.
        for position, cell in enumerate(empty):
            row, column, box = units_of_cell[cell]
            possible = every_digit & ~(used[row] | used[column] | used[box])
            count = possible.bit_count()
            if count < fewest:
                if count == 0:
                    return 0
                fewest, best, options = count, position, possible
                if count == 1:
                    break
        cell = empty[best]
        rest = empty[:best] + empty[best + 1 :]
        choices = _digits(options)
        if rng is not None:
            rng.shuffle(choices)
        found = 0
        for digit in choices:
            self.digits[cell] = digit
            self.flip(cell, digit)
            found += self.search(rest, limit - found, rng)
            self.flip(cell, digit)
            if found == limit:
                break
        return found


def _digits(bits: int) -> list[int]:
    """Return the digits whose bits are set, the lowest first."""
    return [digit for digit in range(1, bits.bit_length()) if bits >> digit & 1]


def count_solutions(puzzle: str, size: int, limit: int = 2) -> int:
    """Return the number of solutions of a puzzle, counting no further than `limit`."""
    filling = _Filling(size)
    for cell, digit in enumerate(map(int, puzzle)):
        if digit:
            if not filling.possible(cell) >> digit & 1:
                return 0
            filling.flip(cell, digit)
    return filling.search([cell for cell, digit in enumerate(puzzle) if digit == "0"], limit)


def random_solution(rng: random.Random, size: int) -> str:
    """Return a random full grid; all grids are nearly equally likely."""
    filling = _Filling(size)
    filling.search(list(range(size * size)), 1, rng)
    return "".join(map(str, filling.digits))


def make_puzzle(
    rng: random.Random, size: int, clues: int, accept: Callable[[str], bool] = lambda solution: True
) -> tuple[str, str] | None:
    """Return a puzzle with exactly `clues` clues, and its one solution.

    The cells of a random solution are emptied in random order while the solution stays unique. None if more
    clues than `clues` remain or the solution is not accepted: try again then.

    Args:
        rng: source of randomness.
        size: digits and side length.
        clues: cells that are given.
        accept: whether to use a solution; called before the slow part.
    """
    solution = random_solution(rng, size)
    if not accept(solution):
        return None
    filling = _Filling(size)
    for cell, digit in enumerate(map(int, solution)):
        filling.flip(cell, digit)
    empty: list[int] = []
    kept = 0
    cells = list(range(size * size))
    rng.shuffle(cells)
    for cell in cells:
        if len(empty) == size * size - clues or kept > clues:
            break
        digit = int(solution[cell])
        filling.flip(cell, digit)
        # With this cell given the solution was unique, so any second one has another digit here.
        for other in _digits(filling.possible(cell) & ~(1 << digit)):
            filling.flip(cell, other)
            ambiguous = filling.search(empty, 1)
            filling.flip(cell, other)
            if ambiguous:
                filling.flip(cell, digit)
                kept += 1
                break
        else:
            empty.append(cell)
    if len(empty) < size * size - clues:
        return None
    hidden = set(empty)
    return "".join("0" if cell in hidden else digit for cell, digit in enumerate(solution)), solution


def split_of(solution: str, held_out_percent: int) -> Split:
    """Return the split of a grid, by its hash.

    All puzzles of a grid are in one split, so neither a held-out puzzle nor its solution is ever trained on,
    whatever the seeds and counts of the files.
    """
    bucket = int.from_bytes(hashlib.sha256(solution.encode()).digest()[:8], "big") % 100
    return "held-out" if bucket < held_out_percent else "train"


def generate(
    size: int, count: int, clues: int, seed: int, split: Split | None, held_out_percent: int
) -> Iterator[tuple[str, str]]:
    """Return an iterator of `count` different puzzles and their solutions, the same for the same arguments.

    Args:
        size: digits and side length.
        count: number of puzzles.
        clues: cells that are given in each of them.
        seed: decides which puzzles of the many there are.
        split: of all grids; None for both.
        held_out_percent: percentage of all grids that is held out.

    Raises:
        UserError: at once for arguments that no puzzle fits; from the iterator if no new puzzle is found
            in many tries.
    """
    boxes(size)
    if count < 1:
        raise UserError(f"--count is {count}: it must be 1 or more.")
    if not FEWEST_CLUES[size] <= clues < size * size:
        raise UserError(
            f"--clues is {clues}: choose from {FEWEST_CLUES[size]} to {size * size - 1}, the clues that a "
            f"{size}x{size} puzzle with one solution can have."
        )
    if not 0 < held_out_percent < 100:
        raise UserError(f"--held-out-percent is {held_out_percent}: it must be from 1 to 99.")
    return _different_puzzles(random.Random(seed), size, count, clues, split, held_out_percent)


def _different_puzzles(
    rng: random.Random, size: int, count: int, clues: int, split: Split | None, held_out_percent: int
) -> Iterator[tuple[str, str]]:
    """Yield the puzzles of `generate`, whose arguments are checked."""
    share = {None: 100, "train": 100 - held_out_percent, "held-out": held_out_percent}[split]
    # A grid of the wrong split is cheap, so a small split gets more tries.
    allowed = TRIES * 100 // share
    seen: set[str] = set()
    tries = 0
    while len(seen) < count:
        if tries == allowed:
            raise UserError(
                f"--count is {count}, but after {len(seen)} different {size}x{size} puzzles with {clues} "
                f"clues no other was found in {allowed} tries: raise --clues or lower --count"
                + (f", or change --held-out-percent, now {held_out_percent}." if split else ".")
            )
        tries += 1
        made = make_puzzle(
            rng, size, clues, lambda grid: split is None or split_of(grid, held_out_percent) == split
        )
        if made is not None and made[0] not in seen:
            seen.add(made[0])
            tries = 0
            yield made
