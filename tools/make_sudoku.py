"""Write Sudoku puzzles, each with a unique solution, as lines of prompt and answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.files import replacing
from pipeline.base.progress import Progress
from pipeline.corpus.recipes.puzzles import BOXES, DEFAULT_CLUES, generate


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file completely or not at all."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument(
        "--size", type=int, choices=sorted(BOXES), required=True, help="side length, and number of digits"
    )
    parser.add_argument("--count", type=int, required=True, help="number of puzzles, all different")
    usual = ", ".join(f"{clues} of {size * size}" for size, clues in DEFAULT_CLUES.items())
    parser.add_argument("--clues", type=int, help=f"given cells (default: {usual})")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same puzzles")
    parser.add_argument("--output", type=Path, required=True, help="jsonl file to write")
    parser.add_argument(
        "--split",
        choices=["all", "train", "held-out"],
        default="all",
        help="grids of one split only; files of different splits never share a grid, whatever their seeds",
    )
    parser.add_argument("--held-out-percent", type=int, default=10, help="percentage of grids to hold out")
    options = parser.parse_args(arguments)
    clues = options.clues if options.clues is not None else DEFAULT_CLUES[options.size]
    split = None if options.split == "all" else options.split
    made = generate(options.size, options.count, clues, options.seed, split, options.held_out_percent)
    with closing(Progress(options.count, 0, "puzzle")) as progress, replacing(options.output) as file:
        for done, (puzzle, solution) in enumerate(made, start=1):
            file.write(json.dumps({"prompt": puzzle, "answer": solution}).encode() + b"\n")
            progress.advance(done)
    print(
        f"wrote {options.count} puzzles of {options.size}x{options.size} with {clues} clues "
        f"to {options.output}"
    )


if __name__ == "__main__":
    run(main)
