"""Decode held-out puzzles with a trained model by top confidence, and score them by the rules of Sudoku."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.cli import ToolParser, UserError, run
from pipeline.evaluation.puzzles import read_puzzles, score_puzzles
from pipeline.monitor.progress import Progress
from pipeline.sampling import WEIGHTS_HELP, SamplingSettings, load_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Print ``solved X.XX of N held-out puzzles``."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--weights", choices=["ema", "raw"], help=WEIGHTS_HELP)
    parser.add_argument("--data", required=True, type=Path, help="jsonl of puzzles (tools/make_sudoku.py)")
    parser.add_argument("--tokens-per-step", type=int, default=1, help="cells filled at a decoding step")
    parser.add_argument("--batch-size", type=int, default=128, help="puzzles decoded together")
    parser.add_argument("--limit", type=int, default=None, help="use only the first LIMIT puzzles")
    parser.add_argument("--untrained", action="store_true", help="score the initial weights, as a baseline")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for figures and answers")
    options = parser.parse_args(arguments)
    settings = SamplingSettings(tokens_per_step=options.tokens_per_step)
    settings.check()
    for name in ("batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more.")
    puzzles = read_puzzles(options.data)[: options.limit]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(options.checkpoint, device, options.untrained, weights=options.weights)
    progress = Progress(len(puzzles), 0, "puzzle")
    score = score_puzzles(loaded, puzzles, settings, options.batch_size, progress.advance)
    progress.close()
    if options.output is not None:
        facts = {"step": loaded.step, "tokens_per_step": options.tokens_per_step, "solved": score.share}
        items = [
            {"puzzle": puzzle, "answer": answer, "solved": solved}
            for puzzle, answer, solved in zip(puzzles, score.answers, score.solved, strict=True)
        ]
        options.output.write_text(json.dumps(facts | {"items": items}, indent=2) + "\n", encoding="utf-8")
    print(f"solved {score.share:.2f} of {len(puzzles)} held-out puzzles")


if __name__ == "__main__":
    run(main)
