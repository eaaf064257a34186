"""Scoring a model on held-out Sudoku puzzles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.records import Keys, check_inputs, read_all
from pipeline.evaluation.sudoku import BOXES, is_solved
from pipeline.sampling import Loaded, SamplingSettings, complete


def read_puzzles(path: Path) -> list[str]:
    """Return the puzzles of a jsonl file of prompts and answers.

    Raises:
        UserError: for a file without puzzles, or with prompts that are none, or of different sizes.
    """
    keys = Keys(("prompt", "answer"))
    check_inputs([path], keys)
    puzzles: list[str] = []
    for record in read_all([path], keys):
        puzzle = record.texts[0]
        size = math.isqrt(len(puzzle))
        digits = "0123456789"[: size + 1]
        if size not in BOXES or size * size != len(puzzle) or any(c not in digits for c in puzzle):
            raise UserError(f"{record.place}: {puzzle!r} is no puzzle; make some with tools/make_sudoku.py.")
        if puzzles and len(puzzle) != len(puzzles[0]):
            raise UserError(f"{record.place}: a puzzle of {size}x{size} among others of another size.")
        puzzles.append(puzzle)
    if not puzzles:
        raise UserError(f"{path} holds no puzzle; make some with tools/make_sudoku.py.")
    return puzzles


@dataclass
class PuzzleScore:
    """How many puzzles a model solved.

    Attributes:
        answers: the model's answer to each puzzle.
        solved: whether it is valid and keeps every clue.
    """

    answers: list[str]
    solved: list[bool]

    @property
    def share(self) -> float:
        """Share of the puzzles that are solved."""
        return sum(self.solved) / len(self.solved)


def score_puzzles(
    loaded: Loaded,
    puzzles: Sequence[str],
    settings: SamplingSettings,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PuzzleScore:
    """Decode an answer of size x size cells for each puzzle and check it by the rules, not by a reference.

    Args:
        loaded: the model.
        puzzles: puzzle strings, '0' for an empty cell.
        settings: of the sampler.
        batch_size: puzzles decoded together.
        on_progress: called with the number of puzzles done.
    """
    cells = len(puzzles[0])
    found = complete(loaded, puzzles, settings, cells, batch_size, on_progress)
    answers = [completion.text for completion in found]
    size = math.isqrt(cells)
    return PuzzleScore(answers, [is_solved(p, a, size) for p, a in zip(puzzles, answers, strict=True)])
