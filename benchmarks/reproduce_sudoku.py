"""Train Sudoku solvers by PUMA, by random masking and by what lies between them, and score all alike.

usage: python benchmarks/reproduce_sudoku.py --seeds 1 2 3 --jobs 2

See benchmarks/comparison.py for what is equal in all of them; the same command resumes an interrupted
comparison. The result is a CSV; benchmarks/plot_reproduction.py draws it.
"""

from __future__ import annotations

from collections.abc import Sequence

import comparison
import trainings
from comparison import BATCH_SIZE, Comparison, Pair, Scores
from pipeline.base.cli import ToolParser, run
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
    "random": "--objective.kind random_masking",
    "random_stratified": "--objective.kind random_masking --objective.mask_count bernoulli"
    " --objective.stratified true",
}
TWICE = {f"{name}_twice": VARIANTS[name] for name in ("random", "puma_turns_mixed")}  # of the steps
DECODINGS = {
    "solved_1": SamplingSettings(tokens_per_step=1),
    "solved_2": SamplingSettings(tokens_per_step=2),
    "solved_4": SamplingSettings(tokens_per_step=4),
    "solved_threshold": SamplingSettings(threshold=0.9),
}


def score(loaded: Loaded, pairs: Sequence[Pair], last: bool) -> Scores:
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


SUDOKU = Comparison(VARIANTS | TWICE, frozenset(TWICE), score, tuple(DECODINGS), ("prompt", "answer"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the variants on puzzles that are made first."""
    parser = ToolParser(__doc__ or "")
    comparison.options_of_all(parser, "sudoku", SUDOKU, steps=1600, interval=100)
    parser.add_argument("--size", type=int, default=6, help="rows of a puzzle")
    parser.add_argument("--clues", type=int, default=20, help="given cells of a puzzle")
    parser.add_argument("--count", type=int, default=20000, help="puzzles to train on")
    parser.add_argument("--puzzles", type=int, default=1000, help="held-out puzzles for the last step")
    parser.add_argument("--curve-puzzles", type=int, default=200, help="held-out puzzles for every point")
    options = comparison.read_options(parser, arguments)
    data = trainings.sudoku_settings(
        options.folder, options.size, options.clues, options.count, options.puzzles
    )
    held_out = options.folder / "held_out.jsonl"
    comparison.compare(options, SUDOKU, data, held_out, options.curve_puzzles, options.puzzles)


if __name__ == "__main__":
    run(main)
