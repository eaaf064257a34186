"""Command-line options of the programs that read a checkpoint; importing this needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser, exports: bool = False) -> None:
    """Add --checkpoint, --weights and --no-verify; `exports` says that exported folders will do, too."""
    places = ["run folder", "RUN:STEP", *(["export"] if exports else []), "or checkpoint"]
    parser.add_argument("--checkpoint", required=True, type=Path, help=", ".join(places))
    parser.add_argument(
        "--weights",
        choices=["ema", "raw"],
        help="ema = the moving average, raw = the weights of the last step; default: ema if the checkpoint "
        "has it",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare the hashes of the checkpoint's files: faster, but damage goes unnoticed",
    )
