"""megatron-core's indexed datasets (.bin/.idx): written from chunks in one pass, read and verified.

The bytes are those of megatron-core's IndexedDatasetBuilder, which takes one tensor at a time in one process;
here workers write parts in parallel, each with its lengths as the only index. Layout of .idx: magic, uint64
version, uint8 dtype code, uint64 sequences, uint64 document indices, int32 lengths, int64 byte offsets, int64
document indices and, for pairs, int8 modes. .bin holds the tokens of all sequences without gaps.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.files import remove_left_overs, replacing
from pipeline.data.arrays import Array
from pipeline.data.paths import bin_path, facts_path, idx_path

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")
DTYPE_CODES: dict[np.dtype[Any], int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
# In memory at a time, whatever the size of the dataset:
CHUNK = 2**14  # sequences
ENTRIES = 2**20  # of a table


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the integer type of a dataset's tokens: uint16 below 65,500 tokens, int32 above."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass
class Part:
    """A run of sequences on the disk.

    Attributes:
        tokens: file of their tokens.
        lengths: [sequences] int32.
    """

    tokens: Path
    lengths: Array

    def chunks(self, dtype: np.dtype[Any], keep: Array | None = None) -> Iterator[Chunk]:
        """Yield the sequences in order, CHUNK at a time; of `keep` [sequences] bool only the true ones."""
        tokens = np.memmap(self.tokens, dtype, "r") if self.tokens.stat().st_size else np.zeros(0, dtype)
        start = 0
        for first in range(0, len(self.lengths), CHUNK):
            lengths = np.asarray(self.lengths[first : first + CHUNK])
            stop = start + int(lengths.sum(dtype=np.int64))
            found = tokens[start:stop]
            start = stop
            if keep is not None and not keep[first : first + CHUNK].all():
                kept = keep[first : first + CHUNK]
                found, lengths = found[np.repeat(kept, lengths)], lengths[kept]
            yield found, lengths


Chunk = tuple[Array, Array]  # tokens [sum of lengths], lengths [sequences] int32


def write_dataset(
    chunks: Iterable[Chunk],
    prefix: Path,
    dtype: np.dtype[Any],
    pairs: bool,
    before_index: Callable[[dict[str, str]], object] = lambda sha256: None,
) -> dict[str, str]:
    """Write a dataset in one pass and constant memory; .idx comes last, and without it there is no dataset.

    If `chunks` fails, an existing dataset stays as it was; otherwise the new one replaces it.

    Args:
        chunks: sequences, in order.
        prefix: path of the dataset, without suffix.
        dtype: integer type of the tokens.
        pairs: two sequences per document, with modes 0 and 1; otherwise one, without modes.
        before_index: called with the sha256 of both files just before .idx appears, to write PREFIX.json.

    Returns:
        The sha256 of both files, under "bin" and "idx".
    """
    digests = {"bin": hashlib.sha256(), "idx": hashlib.sha256()}
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for path in (bin_path(prefix), idx_path(prefix), facts_path(prefix)):
        remove_left_overs(path)
    with TemporaryFile(dir=prefix.parent) as held:
        with replacing(bin_path(prefix)) as file:
            for tokens, lengths in chunks:
                data = np.ascontiguousarray(tokens).data
                file.write(data)
                digests["bin"].update(data)
                held.write(np.ascontiguousarray(lengths, np.int32).data)
            held.flush()
            for stale in (facts_path(prefix), idx_path(prefix)):
                stale.unlink(missing_ok=True)
        size = held.tell()
        all_lengths = np.memmap(held, np.int32, "r") if size else np.zeros(0, np.int32)
        with replacing(idx_path(prefix)) as file:
            for piece in _index(all_lengths, dtype, pairs):
                file.write(piece)
                digests["idx"].update(piece)
            sha256 = {name: digest.hexdigest() for name, digest in digests.items()}
            before_index(sha256)
    return sha256


def _index(lengths: Array, dtype: np.dtype[Any], pairs: bool) -> Iterator[bytes]:
    """Yield the bytes of .idx."""
    sequences, step = len(lengths), 2 if pairs else 1
    documents = sequences // step + 1
    yield MAGIC + HEADER.pack(VERSION, DTYPE_CODES[dtype], sequences, documents)
    for piece in _pieces(sequences):
        yield lengths[piece].tobytes()
    start = 0
    for piece in _pieces(sequences):
        ends = start + np.cumsum(lengths[piece], dtype=np.int64) * dtype.itemsize
        yield np.concatenate([np.array([start], np.int64), ends[:-1]]).tobytes()
        start = int(ends[-1])
    for piece in _pieces(documents):
        yield (np.arange(piece.start, piece.stop, dtype=np.int64) * step).tobytes()
    if pairs:
        for piece in _pieces(sequences):
            yield (np.arange(piece.start, piece.stop) % 2).astype(np.int8).tobytes()


def _pieces(size: int) -> Iterator[slice]:
    """Yield slices of ENTRIES, an even number, that cover a table."""
    return (slice(first, min(first + ENTRIES, size)) for first in range(0, size, ENTRIES))


@dataclass
class IndexFacts:
    """The index of a dataset.

    Attributes:
        sequences: their number.
        documents: their number.
        tokens: their number.
        dtype: integer type of the tokens.
        lengths: [sequences] int32, memory-mapped.
        offsets: [sequences] int64, bytes into .bin, memory-mapped.
        document_starts: [documents + 1] int64, memory-mapped.
        modes: [sequences] int8 (prompt 0, answer 1), memory-mapped; None for text.
    """

    sequences: int
    documents: int
    tokens: int
    dtype: np.dtype[Any]
    lengths: Array
    offsets: Array
    document_starts: Array
    modes: Array | None


def read_index(prefix: Path) -> IndexFacts:
    """Return the index of a dataset, in constant time.

    Raises:
        UserError: if a file is missing, truncated or not of this format.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            remedy = "make it with tools/preprocess_data.py"
            if prefix.suffix in (".bin", ".idx") and prefix.is_file():
                remedy = f"name it without its suffix, {prefix.with_suffix('')}"
            raise UserError(f"dataset {prefix}: {path} does not exist; {remedy}.")
    path = idx_path(prefix)
    with path.open("rb") as file:
        magic, header = file.read(len(MAGIC)), file.read(HEADER.size)
    if magic != MAGIC or len(header) < HEADER.size:
        raise UserError(f"{path} is not the index of a dataset: preprocess the corpus again.")
    version, code, sequences, indices = HEADER.unpack(header)
    offset = len(MAGIC) + HEADER.size
    size = path.stat().st_size - offset
    without_modes = sequences * 12 + indices * 8
    if version != VERSION or code not in DTYPES or size not in (without_modes, without_modes + sequences):
        raise UserError(f"{path} is truncated or of another format: preprocess the corpus again.")
    has_modes = size > without_modes
    tables: list[Array] = []
    for kind, count in zip(
        "iqqb", (sequences, sequences, indices, sequences if has_modes else 0), strict=True
    ):
        tables.append(np.memmap(path, kind, "r", offset, (count,)) if count else np.zeros(0, kind))
        offset += tables[-1].nbytes
    lengths, offsets, starts, modes = tables
    dtype = DTYPES[code]
    size = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    if bin_path(prefix).stat().st_size != size:
        raise UserError(
            f"{bin_path(prefix)} does not have the size that {path} says: preprocess the corpus again."
        )
    return IndexFacts(
        sequences, max(0, indices - 1), size // dtype.itemsize, dtype, lengths, offsets, starts,
        modes if has_modes else None,
    )  # fmt: skip


def read_sequence(prefix: Path, facts: IndexFacts, number: int) -> Array:
    """Return the tokens of one sequence."""
    return np.fromfile(
        bin_path(prefix), facts.dtype, int(facts.lengths[number]), offset=int(facts.offsets[number])
    )


def find_faults(prefix: Path, facts: IndexFacts, vocab_size: int) -> list[str]:
    """Return the violated invariants of a dataset; reads both files completely, in constant memory."""
    faults = []
    step = 1 if facts.modes is None else 2
    expected_start = 0
    for piece in _pieces(facts.sequences):
        lengths = np.asarray(facts.lengths[piece], np.int64)
        if (lengths < 0).any():
            faults.append(f"sequence {piece.start + int(np.argmax(lengths < 0))} has a negative length")
        ends = expected_start + np.cumsum(lengths) * facts.dtype.itemsize
        wrong = facts.offsets[piece] != ends - lengths * facts.dtype.itemsize
        if wrong.any():
            faults.append(
                f"sequence {piece.start + int(np.argmax(wrong))} does not begin where the previous one ends"
            )
        expected_start = int(ends[-1])
        if facts.modes is not None:
            wrong = facts.modes[piece] != np.arange(piece.start, piece.stop) % 2
            if wrong.any():
                faults.append(f"sequence {piece.start + int(np.argmax(wrong))} has the wrong mode")
    for piece in _pieces(facts.documents + 1):
        wrong = facts.document_starts[piece] != np.arange(piece.start, piece.stop, dtype=np.int64) * step
        if wrong.any():
            faults.append(f"document {piece.start + int(np.argmax(wrong))} does not begin at its sequence")
    if expected_start != facts.tokens * facts.dtype.itemsize:
        faults.append(
            f"the lengths add up to {expected_start} bytes, .bin has {facts.tokens * facts.dtype.itemsize}"
        )
    tokens = np.memmap(bin_path(prefix), facts.dtype, "r") if facts.tokens else np.zeros(0, facts.dtype)
    for piece in _pieces(facts.tokens):
        wrong = (tokens[piece] < 0) | (tokens[piece] >= vocab_size)
        if wrong.any():
            faults.append(f"token {piece.start + int(np.argmax(wrong))} is not an id of the vocabulary")
            break
    return faults
