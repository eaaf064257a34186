"""Command-line options of the programs that read a checkpoint; importing this needs no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.base.errors import UserError


def add_options(
    parser: argparse.ArgumentParser, exports: bool = False, several: Literal["+"] | None = None
) -> None:
    """Add --checkpoint, --weights and --no-verify.

    Args:
        parser: of the program.
        exports: exported folders will do, too.
        several: "+" for a list of checkpoints.
    """
    places = ["run folder", "RUN:STEP", *(["export"] if exports else []), "or checkpoint"]
    parser.add_argument("--checkpoint", required=True, nargs=several, type=Path, help=", ".join(places))
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


def check_shares(count: int, shares: Sequence[float] | None) -> None:
    """Raise a `UserError` unless each of two or more checkpoints has a share above 0; None = equal shares."""
    given = [1.0] * count if shares is None else shares
    if count < 2 or len(given) != count or not all(0 < share < math.inf for share in given):
        raise UserError(
            f"{count} checkpoints and --shares {list(given)}: give two checkpoints or more, and one share "
            "above 0 for each, or none."
        )
