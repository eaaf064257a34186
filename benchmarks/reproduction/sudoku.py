"""Sudoku puzzles of 4x4 and 6x6 cells, solved by PUMA, by random masking and by what lies between them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import comparison, trainings
from benchmarks.comparison import BATCH_SIZE, Comparison, Scores, Texts
from benchmarks.reproduction.arms import BELL, RANDOM
from pipeline.checkpoint.load_model import Loaded
from pipeline.corpus.recipes.puzzles import is_solved
from pipeline.decoding.completing import complete
from pipeline.decoding.sampling import SamplingSettings

VARIANTS = {
    "puma": "--objective.stages 6",
    "puma_turns": "--objective.stages 6 --objective.turns 32",
    "puma_turns_8": "--objective.stages 6 --objective.turns 8",
    "puma_turns_mixed": "--objective.stages 6 --objective.turns 32 --objective.random_share 0.25",
    "puma_turns_threshold": "--objective.stages 6 --objective.turns 32 --objective.threshold 0.9",
    "puma_12": "--objective.stages 12",
    "puma_threshold": "--objective.stages 6 --objective.threshold 0.9",
    "puma_schedule": "--objective.stages 6 --objective.stages_maximum 12 --objective.stages_increment 2"
    " --objective.stages_first_increase 300 --objective.stages_interval 150",
    "puma_mixed": "--objective.stages 6 --objective.random_share 0.25",
    "puma_margin": "--objective.stages 6 --objective.policy margin",
    "chain_random_order": "--objective.stages 6 --objective.policy random",
    "chain_left_to_right": "--objective.stages 6 --objective.policy left_to_right",
    "random": RANDOM,
    "random_bell": f"{RANDOM} {BELL}",
    "random_stratified": f"{RANDOM} --objective.mask_count bernoulli --objective.stratified true",
}
TWICE = {f"{name}_twice": VARIANTS[name] for name in ("random", "puma_turns_mixed")}  # of the steps
DECODINGS = {
    "solved_1": SamplingSettings(tokens_per_step=1),
    "solved_2": SamplingSettings(tokens_per_step=2),
    "solved_4": SamplingSettings(tokens_per_step=4),
    "solved_threshold": SamplingSettings(threshold=0.9),
}


def score(loaded: Loaded, pairs: Sequence[Texts], last: bool) -> Scores:
    """Return the share of the puzzles that each decoding solves (the first, if not `last`), and the bound."""
    puzzles = [puzzle for puzzle, _ in pairs]
    cells = len(puzzles[0])
    figures = {}
    for name in list(DECODINGS) if last else list(DECODINGS)[:1]:
        answers = complete(loaded, puzzles, DECODINGS[name], cells, BATCH_SIZE)
        solved = [is_solved(p, a.text, round(cells**0.5)) for p, a in zip(puzzles, answers, strict=True)]
        figures[name] = sum(solved) / len(solved)
    encode = loaded.tokenizer.encode
    tokens = [(encode(puzzle).tolist(), encode(solution).tolist()) for puzzle, solution in pairs]
    return figures | comparison.bound(loaded, tokens)


def prepare(size: int, clues: int, folder: Path, options: Namespace) -> list[str]:
    """Make puzzles to train on, and puzzles to solve that share no grid with those."""
    return trainings.sudoku_settings(folder, size, clues, options.count, options.items)


def puzzles(size: int, clues: int, steps: int, curve: int) -> Comparison:
    """Return the comparison on puzzles of size x size cells.

    Args:
        size: rows of a puzzle.
        clues: its given cells.
        steps: of a run.
        curve: puzzles that every checkpoint is scored on.
    """
    return Comparison(
        variants=VARIANTS | TWICE,
        score=score,
        columns=tuple(DECODINGS),
        prepare=partial(prepare, size, clues),
        config="sudoku",
        steps=steps,
        interval=100,
        count=20_000,
        items=1000,
        curve_items=curve,
        twice=frozenset(TWICE),
    )


SUDOKU_4, SUDOKU_6 = puzzles(4, 6, 1000, 200), puzzles(6, 20, 700, 100)
