"""Build a folder on one rank of two for longer than a collective may take."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.data import blend
from pipeline.ranks import join_ranks


def main(folder: Path) -> None:
    """Print what this rank found."""
    blend.POLL = 0.5
    ranks = join_ranks("cpu")
    ranks.connect(time_limit=timedelta(seconds=3))

    def build(writing: Path) -> None:
        time.sleep(6)
        (writing / "whole").touch()

    def fail(writing: Path) -> None:
        raise UserError("too little")

    blend.build_once(folder / "cache", build, ranks)
    found = "built" if (folder / "cache" / "whole").exists() else "nothing"
    try:
        blend.build_once(folder / "other", fail, ranks)
    except UserError as error:
        sys.stdout.write(f"rank {ranks.rank}: {found}, then: {error}\n")
    sys.stdout.flush()
    ranks.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
