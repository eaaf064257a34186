"""How long a run waits for its examples on a dataset of many documents: when they are built, and when cached.

The dataset is synthetic: an index like that of real text, and a .bin of zeros that takes no room on the disk.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

from pipeline.base.cli import ToolParser, run
from pipeline.base.files import sha256_of
from pipeline.config import DataConfig
from pipeline.corpus.tokenizer_making import train_tokenizer
from pipeline.data.facts import FORMAT, Counts, DatasetFacts, check_data, write_facts
from pipeline.data.indexed import Chunk, token_dtype, write_dataset
from pipeline.data.paths import bin_path
from pipeline.data.tokenizer import Tokenizer
from pipeline.ranks import Ranks

CHUNK = 2**20  # documents


def write_synthetic(prefix: Path, documents: int, mean_tokens: int, tokenizer: Path) -> None:
    """Write a dataset of documents with exponentially distributed lengths, whose tokens are all 0."""
    loaded, random = Tokenizer.load(tokenizer), np.random.default_rng(0)
    dtype = token_dtype(loaded.vocab_size)
    total = 0

    def chunks() -> Iterator[Chunk]:
        nonlocal total
        for first in range(0, documents, CHUNK):
            count = min(CHUNK, documents - first)
            lengths = random.geometric(1 / mean_tokens, count).astype(np.int32)
            total += int(lengths.sum(dtype=np.int64))
            yield np.zeros(0, dtype), lengths

    write_dataset(chunks(), prefix, dtype, pairs=False)
    with bin_path(prefix).open("r+b") as file:
        file.truncate(total * dtype.itemsize)
    counts = Counts(records=documents, documents=documents, tokens=total)
    write_facts(
        DatasetFacts(
            FORMAT, "text", str(tokenizer), loaded.sha256, loaded.special_ids, loaded.vocab_size, {}, None,
            counts, 0, {}, [], [], {"bin": "synthetic", "idx": sha256_of(tokenizer / "tokenizer.model")},
        ),
        prefix,
    )  # fmt: skip


def start(prefix: Path, tokenizer: Path, sequence_length: int) -> None:
    """Do what a run does for its examples, read one, and print the time and the memory."""
    began = time.monotonic()
    from pipeline.data.datasets import build_datasets  # imports megatron-core and torch

    imported, cpu = time.monotonic(), time.process_time()
    config = DataConfig(str(tokenizer), [str(prefix)], sequence_length=sequence_length)
    loaded = Tokenizer.load(tokenizer)
    data = build_datasets(config, check_data(config, loaded), loaded, 1, prefix.parent / "cache", Ranks())
    assert len(data.train[len(data.train) - 1]["tokens"]) == sequence_length
    rss = psutil.Process().memory_info().rss / 1e9
    print(
        f"samples ready in {time.monotonic() - imported:.2f} s, {time.process_time() - cpu:.2f} s of CPU "
        f"({len(data.train):,} of {sequence_length} tokens; imports {imported - began:.2f} s; {rss:.2f} GB)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the dataset, then start twice, each time in a new process."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--documents", type=int, default=10**8, help="documents in the dataset")
    parser.add_argument("--mean-tokens", type=int, default=500, help="tokens of a document, on average")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens of an example")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_start"), help="scratch")
    parser.add_argument("--only-start", action="store_true", help="use the dataset and cache that are there")
    options = parser.parse_args(arguments)
    prefix, tokenizer = options.folder / "synthetic", options.folder / "tokenizer"
    if options.only_start:
        start(prefix, tokenizer, options.sequence_length)
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    train_tokenizer(["a b c"], 266, "bpe", tokenizer)
    write_synthetic(prefix, options.documents, options.mean_tokens, tokenizer)
    command = [sys.executable, "-m", __spec__.name, *(arguments or sys.argv[1:]), "--only-start"]
    for name in ("built", "cached"):
        began = time.monotonic()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"{options.documents:,} documents, {name}: {output}; process {time.monotonic() - began:.2f} s")


if __name__ == "__main__":
    run(main)
