"""Build the examples of a dataset on each rank as if it were a node of its own, with a disk of its own."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.data import datasets
from pipeline.data.facts import check_data
from pipeline.data.tokenizer import Tokenizer
from pipeline.ranks import Ranks, join_ranks


def main(folder: Path, own_disk: bool) -> None:
    """Print what each rank built and which examples it has."""
    if own_disk:
        os.environ["LOCAL_RANK"] = "0"
    ranks = join_ranks("cpu")
    ranks.connect()
    rank = ranks.rank
    builds = []
    once = datasets.build_once

    def counting(target: Path, build: Callable[[Path], object], ranks: Ranks) -> None:
        once(target, lambda writing: (builds.append(1), build(writing)), ranks)

    datasets.build_once = counting
    config = DataConfig(
        tokenizer=str(folder / "tokenizer"), prefixes=[str(folder / "p"), str(folder / "q")], kind="pairs",
        sequence_length=16, weights=[1.0, 2.0], split="80,20,0",
    )  # fmt: skip
    cache = folder / (f"cache_of_{rank}" if own_disk else "shared_cache")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    data = datasets.build_datasets(config, check_data(config, tokenizer), tokenizer, 1, cache, ranks)
    content = b"".join(data.train[i]["tokens"].tobytes() for i in range(len(data.train)))
    # One write for the line and its end: print makes two of them, and the other rank's line may come between.
    sys.stdout.write(f"rank {rank}: {len(builds)} builds, examples {hashlib.sha256(content).hexdigest()}\n")
    sys.stdout.flush()
    ranks.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "own")
