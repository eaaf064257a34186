"""Small datasets on the disk, made in this process as the workers make them, without starting a pool."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from pipeline.corpus.encode import WordEncoder
from pipeline.corpus.merge import merge_parts
from pipeline.corpus.partition import Options, Partition, make_partition, write_partition
from pipeline.corpus.records import Keys
from pipeline.corpus.worker import Job, make_part
from pipeline.data.facts import DatasetFacts
from pipeline.data.paths import bin_path, facts_path, idx_path, parts_folder
from pipeline.data.tokenizer import Tokenizer

TEXT = Keys(("text",))
PAIRS, AS_PAIRS = Keys(("q", "a")), ("--prompt-key", "q", "--answer-key", "a")


def command(corpus: Path, prefix: Path, *more: str, inputs: Sequence[Path | str] = ()) -> list[str]:
    """Return a command line of the tool; text of x.jsonl by one worker unless `more` says otherwise."""
    given = [str(path) for path in inputs or [corpus / "x.jsonl"]]
    return [
        "--input", *given, "--tokenizer", str(corpus / "tokenizer"), "--output-prefix", str(prefix),
        "--workers", "1", *more,
    ]  # fmt: skip


def partition_of(
    inputs: Sequence[Path | str],
    tokenizer: Path,
    keys: Keys = TEXT,
    unit_bytes: int | None = None,
    **options: Any,
) -> Partition:
    """Return the partition of a corpus."""
    return make_partition(
        [str(path) for path in inputs], None, tokenizer, Options(keys, **options), unit_bytes
    )


def make_dataset(
    inputs: Sequence[Path | str],
    tokenizer: Path,
    prefix: Path,
    keys: Keys = TEXT,
    unit_bytes: int | None = None,
    **options: Any,
) -> DatasetFacts:
    """Preprocess a corpus; bad records are quarantined, the parts stay."""
    partition = partition_of(inputs, tokenizer, keys, unit_bytes, **options)
    return merge_parts(make_parts(partition, prefix), prefix)[0][1]


def make_parts(partition: Partition, prefix: Path) -> Path:
    """Make all parts of a partition; return their folder."""
    folder = parts_folder(prefix)
    write_partition(partition, folder)
    encoder = WordEncoder(Tokenizer.load(Path(partition.tokenizer)))
    for unit in range(len(partition.units)):
        make_part(Job(partition, folder, "quarantine"), encoder, unit, lambda done, tokens: None)
    return folder


def digests(prefix: Path) -> list[str]:
    """Return the sha256 of a dataset's three files."""
    files = [bin_path(prefix), idx_path(prefix), facts_path(prefix)]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def build_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: np.dtype, pairs: bool) -> None:
    """Write a dataset by megatron-core's own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type, multimodal=pairs)
    for document in documents:
        for mode, sequence in enumerate(document):
            builder.add_item(torch.tensor(sequence, dtype=torch.int64), mode if pairs else 0)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
