"""Writing megatron-core's indexed datasets (.bin/.idx) in parts, and their header facts.

The bytes are those of megatron-core's own IndexedDatasetBuilder, which takes one tensor at a time in one
process; here many workers write parts, and a part's index is only its lengths. Layout of .idx: magic, uint64
version, uint8 dtype code, uint64 sequences, uint64 document indices, int32 lengths, int64 byte offsets, int64
document indices and, for pairs, int8 modes. .bin holds the tokens of every sequence, one after the other.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cli import UserError
from pipeline.data.batch import Array
from pipeline.files import replacing

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")
DTYPE_CODES: dict[np.dtype[Any], int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the integer type of a dataset's tokens: uint16 below 65,500 tokens, int32 above."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: Path) -> Path:
    """Return the path of a dataset's tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the path of a dataset's index."""
    return prefix.with_name(prefix.name + ".idx")


@dataclass
class Part:
    """A piece of a dataset: its tokens are in a file, the rest is here.

    Attributes:
        tokens: file of the tokens.
        lengths: [sequences] int32.
    """

    tokens: Path
    lengths: Array


def join(parts: Sequence[Part], prefix: Path, dtype: np.dtype[Any], pairs: bool) -> None:
    """Write the dataset of `parts`, in their order; .idx comes last, and a dataset without it does not exist.

    Args:
        parts: pieces, whose token files are left in place.
        prefix: path of the dataset without .bin and .idx.
        dtype: integer type of the tokens.
        pairs: two sequences a document, with modes 0 and 1; otherwise one, without modes.
    """
    idx_path(prefix).unlink(missing_ok=True)
    with replacing(bin_path(prefix)) as file:
        for part in parts:
            with part.tokens.open("rb") as source:
                shutil.copyfileobj(source, file, 2**22)
    lengths = np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)]).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    documents = np.arange(0, len(lengths) + 1, 2 if pairs else 1, dtype=np.int64)
    with replacing(idx_path(prefix)) as file:
        file.write(MAGIC + HEADER.pack(VERSION, DTYPE_CODES[dtype], len(lengths), len(documents)))
        for table in (lengths, np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(lengths)], documents):
            file.write(table.tobytes())
        if pairs:
            file.write(np.tile(np.array([0, 1], np.int8), len(lengths) // 2).tobytes())


@dataclass
class IndexFacts:
    """What the index of a dataset says.

    Attributes:
        sequences: number of sequences.
        documents: number of documents.
        tokens: number of tokens.
        dtype: integer type of the tokens.
        lengths: [sequences] int32, memory-mapped.
        has_modes: whether sequences carry modes (prompt 0, answer 1).
    """

    sequences: int
    documents: int
    tokens: int
    dtype: np.dtype[Any]
    lengths: Array
    has_modes: bool


def read_index(prefix: Path) -> IndexFacts:
    """Return the facts of a dataset; raise a `UserError` when a file is missing, cut short or foreign."""
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise UserError(
                f"dataset {prefix}: {path} does not exist; make it with tools/preprocess_data.py."
            )
    path = idx_path(prefix)
    with path.open("rb") as file:
        magic, header = file.read(len(MAGIC)), file.read(HEADER.size)
    if magic != MAGIC or len(header) < HEADER.size:
        raise UserError(f"{path} is no index of a dataset: preprocess the corpus again.")
    version, code, sequences, indices = HEADER.unpack(header)
    tables = path.stat().st_size - len(MAGIC) - HEADER.size
    without_modes = sequences * 12 + indices * 8
    if version != VERSION or code not in DTYPES or tables not in (without_modes, without_modes + sequences):
        raise UserError(f"{path} is cut short or of another format: preprocess the corpus again.")
    offset = len(MAGIC) + HEADER.size
    lengths = np.memmap(path, np.int32, "r", offset, (sequences,)) if sequences else np.zeros(0, np.int32)
    dtype, tokens = DTYPES[code], int(np.sum(lengths, dtype=np.int64))
    if bin_path(prefix).stat().st_size != tokens * dtype.itemsize:
        raise UserError(f"{bin_path(prefix)} has not the size that {path} says: preprocess the corpus again.")
    has_modes = tables > without_modes
    return IndexFacts(sequences, max(0, indices - 1), tokens, dtype, lengths, has_modes)


def unigram_entropy(prefix: Path, facts: IndexFacts, modes: tuple[int, ...] = (0, 1)) -> float:
    """Return the entropy (nats a token) of a dataset's token frequencies: what a model must get below.

    Args:
        prefix: path of the dataset.
        facts: its index.
        modes: which sequences of prompt/answer documents are counted; ignored for text.
    """
    counts = np.zeros(np.iinfo(np.uint16).max + 1 if facts.dtype == np.uint16 else 2**20, np.int64)
    tokens = np.memmap(bin_path(prefix), facts.dtype, "r")
    chosen = (
        np.isin(np.arange(facts.sequences) % 2, modes) if facts.has_modes else np.ones(facts.sequences, bool)
    )
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(facts.lengths, dtype=np.int64)])
    for first in range(0, facts.sequences, 2**16):
        part = slice(first, min(first + 2**16, facts.sequences))
        ids = tokens[starts[part.start] : starts[part.stop]]
        counts += np.bincount(ids[np.repeat(chosen[part], facts.lengths[part])], minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def read_sequence(prefix: Path, facts: IndexFacts, number: int) -> Array:
    """Return the tokens of one sequence."""
    start = int(np.sum(facts.lengths[:number], dtype=np.int64)) * facts.dtype.itemsize
    return np.fromfile(bin_path(prefix), facts.dtype, int(facts.lengths[number]), offset=start)
