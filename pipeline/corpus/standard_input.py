"""Standard input as a file: workers read byte ranges, and a resumed run compares its inputs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.base.files import replacing
from pipeline.corpus.compression import COMPRESSIONS, DAMAGE, decompressed
from pipeline.corpus.reading import BOM

_PIECE = 2**20  # bytes; more than a block of any compression


@contextlib.contextmanager
def standard_input(inputs: Sequence[str], target: Path) -> Iterator[list[str]]:
    """Yield the inputs, ``-`` replaced by a file with the content of standard input; remove it in the end.

    Its suffixes are guessed from the content. The same content gives the same name and time of change, so a
    run that is repeated with it resumes.

    Args:
        inputs: see `sources.find`.
        target: path of the result; the file is written beside it.
    """
    if "-" not in inputs:
        yield list(inputs)
        return
    if inputs.count("-") > 1:
        raise UserError("--input: - is given twice: standard input can be read once.")
    path = None
    try:
        path = _write(target)
        yield [str(path) if given == "-" else given for given in inputs]
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _write(target: Path) -> Path:
    source = sys.stdin.buffer
    head = source.read(_PIECE)
    if not head:
        raise UserError("standard input is empty: pipe a corpus into --input -, or name files.")
    suffix = suffix_of(head)
    path = target.with_name(f".{target.name}.stdin{suffix}")
    digest, size = hashlib.sha256(), 0
    with replacing(path) as file:
        piece = head
        while piece:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            piece = source.read(_PIECE)
    os.utime(path, ns=(0, int.from_bytes(digest.digest()[:7], "little")))
    print(f"standard input: {size:,} bytes, read as {suffix}")
    return path


def suffix_of(head: bytes) -> str:
    """Return the suffixes of a file that begins with `head`, such as ``.jsonl.zst``."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ".arrow"
    compression = next((name for name, (_, magic) in COMPRESSIONS.items() if head.startswith(magic)), "")
    if compression:
        try:
            head = decompressed(io.BufferedReader(io.BytesIO(head)), compression).read1(_PIECE)  # type: ignore
        except (OSError, *DAMAGE):  # the first record says what is wrong
            head = b""
    start = head.removeprefix(BOM).lstrip()[:1]
    return (".jsonl" if start in (b"{", b"[", b"") else ".txt") + compression
