"""Build the examples of a dataset on each rank as if it were a node of its own, with a disk of its own."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

from pipeline.config import DataConfig
from pipeline.data import datasets
from pipeline.data.facts import check_data
from pipeline.data.tokenizer import Tokenizer


def main(folder: Path, own_disk: bool) -> None:
    """Print what each rank built and which examples it has."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    os.environ["LOCAL_RANK"] = "0" if own_disk else str(rank)
    builds = []
    once = datasets.build_once

    def counting(target: Path, build: object) -> None:
        once(target, lambda writing: (builds.append(1), build(writing)))

    datasets.build_once = counting
    config = DataConfig(
        tokenizer=str(folder / "tokenizer"), prefixes=[str(folder / "p"), str(folder / "q")], kind="pairs",
        sequence_length=16, weights=[1.0, 2.0], split="80,20,0",
    )  # fmt: skip
    cache = folder / (f"cache_of_{rank}" if own_disk else "shared_cache")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    data = datasets.build_datasets(config, check_data(config, tokenizer), tokenizer, 1, cache)
    content = b"".join(data.train[i]["tokens"].tobytes() for i in range(len(data.train)))
    # One write for the line and its end: print makes two of them, and the other rank's line may come between.
    sys.stdout.write(f"rank {rank}: {len(builds)} builds, examples {hashlib.sha256(content).hexdigest()}\n")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "own")
