"""Scoring a model on held-out Sudoku puzzles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.evaluation.sudoku import is_solved
from pipeline.sampling import Loaded, complete


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
    tokens_per_step: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PuzzleScore:
    """Decode an answer of size x size cells for each puzzle and check it by the rules, not by a reference.

    Args:
        loaded: the model.
        puzzles: puzzle strings, '0' for an empty cell.
        tokens_per_step: cells filled at a decoding step.
        batch_size: puzzles decoded together.
        on_progress: called with the number of puzzles done.
    """
    cells = len(puzzles[0])
    answers = complete(loaded, puzzles, cells, tokens_per_step, batch_size, on_progress)
    size = math.isqrt(cells)
    return PuzzleScore(answers, [is_solved(p, a, size) for p, a in zip(puzzles, answers, strict=True)])
