"""Sudoku puzzles, judged by the rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.base.errors import UserError
from pipeline.corpus.recipes.puzzles import BOXES, is_solved
from pipeline.corpus.records import Document
from pipeline.evaluation.tasks.task import Item, Task, Verdict


class Sudoku(Task):
    """Grids of 4, 6 or 9 cells per side, one token per cell; any valid grid that keeps the clues is right."""

    def check(self, item: Item, record: Document, before: Sequence[Item]) -> None:
        puzzle = item.prompt
        size = math.isqrt(len(puzzle))
        digits = "0123456789"[: size + 1]
        if size not in BOXES or size * size != len(puzzle) or any(c not in digits for c in puzzle):
            raise UserError(f"{record.place}: {puzzle!r} is no puzzle: make some with tools/make_sudoku.py.")
        if before and len(puzzle) != len(before[0].prompt):
            raise UserError(f"{record.place}: a puzzle of {size}x{size} among others of another size.")

    def answer_length(self, items: Sequence[Item]) -> int | None:
        return len(items[0].prompt)

    def score(self, item: Item, answer: str) -> Verdict:
        return Verdict(is_solved(item.prompt, answer, math.isqrt(len(item.prompt))), answer)

    def summary(self, right: int, total: int) -> str:
        return f"solved {right / total:.2f} of {total} held-out puzzles"
