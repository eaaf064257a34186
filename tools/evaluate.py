"""Decode held-out puzzles with a trained model and score them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.cli import ToolParser, UserError, run
from pipeline.data.records import PairKeys, read_pairs
from pipeline.evaluation.sudoku import is_solved
from pipeline.monitor.progress import Progress
from pipeline.sampling import complete, load_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Print ``solved X.XX of N held-out puzzles``."""
    parser = ToolParser(description=__doc__ or "")
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--data", required=True, type=Path, help="jsonl of puzzles (tools/make_sudoku.py)")
    parser.add_argument("--tokens-per-step", type=int, default=1, help="cells filled at a decoding step")
    parser.add_argument("--batch-size", type=int, default=128, help="puzzles decoded together")
    parser.add_argument("--limit", type=int, default=None, help="use the first puzzles only")
    parser.add_argument("--untrained", action="store_true", help="score the initial weights: a baseline")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures and every answer")
    options = parser.parse_args(arguments)
