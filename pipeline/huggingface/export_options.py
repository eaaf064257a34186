"""Command-line options of the programs that write model folders; importing this needs no torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.checkpoint.manifest import find, is_export

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_shard_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option --max-shard-size."""
    parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        help="maximum size of a weights file, and roughly the memory used",
    )


def check_there(path: Path) -> None:
    """Raise a `UserError` if `path` is neither an export nor a run, RUN:STEP or checkpoint."""
    if not is_export(path):
        find(path)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB)", text.upper())
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}: give a whole number with KB, MB or GB, such as 5GB.")
    return int(match[1]) * UNITS[match[2]]
