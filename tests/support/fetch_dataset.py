"""Fetch a dataset as the ranks of several nodes do before a training; started by the tests.

usage: fetch_dataset.py URL LOG CACHE [CACHE ...], with two ranks for each CACHE: each is the disk of a node.
LOG gets a line for each request: rank, object, and the first byte. KILLED=RANK in the environment kills a
rank that has two pieces on its disk.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from pipeline.base import object_store
from pipeline.base.cli import run
from pipeline.base.object_store import Store, Stored
from pipeline.config import DataConfig
from pipeline.ranks import join_ranks
from pipeline.training.fetching import fetch_datasets

RANKS = 2  # of a node
PIECE = 2**14  # bytes: beyond the buffer of a file, so that a kill loses none
REQUEST = Store._piece


def main(url: str, log: Path, caches: list[str]) -> None:
    """Fetch to the cache of this rank's node; print the local prefix."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % RANKS)
    ranks = join_ranks("cpu")
    ranks.connect()
    object_store.PIECE, object_store.AHEAD = PIECE, 1
    done = []

    def piece(store: Store, stored: Stored, start: int) -> bytes:
        content = REQUEST(store, stored, start)
        with log.open("a") as file:
            file.write(f"{rank} {stored.url} {start}\n")
        done.append(start)
        if os.environ.get("KILLED") == str(rank) and len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return content

    Store._piece = piece  # type: ignore[method-assign]
    config = DataConfig(tokenizer="", prefixes=[url])
    print(fetch_datasets(config, Path(caches[rank // RANKS]), ranks).prefixes[0])


if __name__ == "__main__":
    run(lambda arguments: main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]), of_ranks=True)
