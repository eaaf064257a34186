"""Sources cut into spans, and the raw records of a span, each with its position.

A span is what a worker reads by itself: a byte range of a plain file, row groups of a parquet file, a whole
compressed or arrow file, or one shard of a streamed dataset. A record is a line of jsonl, a paragraph of text
(or a line, or the whole file), or a row of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pipeline.base.errors import UserError
from pipeline.corpus.compression import COMPRESSIONS, DAMAGE
from pipeline.corpus.sources import Source, load_hub, open_file, other_encoding

ROWS = 256  # of a table, in memory at a time
PIECE = 2**20  # bytes of a line that is too long, in memory at a time
BOM = b"\xef\xbb\xbf"
DAMAGED = "damaged_file"  # the reason of a bad record that stands for the rest of its file
Unit = Literal["line", "paragraph", "file"]  # of a text file that is one record


class BadRecord(Exception):
    """A record that cannot be used.

    Attributes:
        reason: one of a fixed set, by which bad records are counted.
        detail: what is wrong, without a full stop.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


Content = bytes | dict[str, Any] | BadRecord


@dataclass(frozen=True)
class Span:
    """A part of one source.

    Attributes:
        source: its number in the partition.
        start: first byte, row group or shard.
        end: the one after the last; for a compressed or arrow file its size.
        size: bytes on the disk, for progress and load balance.
    """

    source: int
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        unit: what is a record of a text file.
        limit: bytes of the longest record.
        columns: of a table, the columns to read.
    """

    unit: Unit
    limit: int
    columns: tuple[str, ...]


def cut(number: int, source: Source, target: Callable[[], int], unit: Unit) -> Iterator[Span]:
    """Yield the spans of a source in order, each of about `target()` bytes at that moment; none if empty."""
    if source.format == "hub":
        yield from (Span(number, shard, shard + 1, target()) for shard in range(source.size))
    elif source.format == "parquet":
        yield from _cut_parquet(number, source, target)
    elif not source.is_cut_in_bytes or (source.format == "text" and unit == "file"):
        if source.size:
            yield Span(number, 0, source.size, source.size)
    else:
        start, paragraphs = 0, source.format == "text" and unit == "paragraph"
        with Path(source.path).open("rb") as file:
            while start < source.size:
                end = _end_of_record(file, min(source.size, start + target()), source.size, paragraphs)
                yield Span(number, start, end, end - start)
                start = end


def _cut_parquet(number: int, source: Source, target: Callable[[], int]) -> Iterator[Span]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            groups = file.metadata.num_row_groups
            sizes = [
                sum(
                    file.metadata.row_group(g).column(c).total_compressed_size
                    for c in range(file.metadata.num_columns)
                )
                for g in range(groups)
            ]
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"--input {source.path} is not a complete parquet file ({error}): get a new copy."
        ) from None
    first, size = 0, 0
    for group, of_group in enumerate(sizes, start=1):
        size += of_group
        if size >= target() or group == groups:
            yield Span(number, first, group, size)
            first, size = group, 0


def _end_of_record(file: BinaryIO, position: int, size: int, paragraphs: bool) -> int:
    """Return the end of the record that contains the byte before `position`."""
    if position >= size:
        return size
    file.seek(position - 1)
    _skip_line(file)
    while paragraphs and _skip_line(file).strip():
        pass
    return min(file.tell(), size)


def _skip_line(file: BinaryIO) -> bytes:
    """Read to the end of a line, however long; return a piece that is blank only if the whole line is."""
    seen = piece = file.readline(PIECE)
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(PIECE)
        seen = seen if seen.strip() else piece
    return seen


class SpanReader:
    """Iterates over (position, content) of the records of a span.

    The position is the first byte of a line or paragraph (after decompression), or the number of a row. The
    content of a blank line is empty. A record already known to be bad is a `BadRecord`.
    """

    def __init__(self, source: Source, span: Span, reading: Reading) -> None:
        self.source = source
        self.span = span
        self.reading = reading
        self._raw: BinaryIO | None = None
        self._share = 0.0

    @property
    def done(self) -> int:
        """Bytes read from the disk so far, approximately."""
        if self._raw is not None and self._raw.closed:
            return self.span.size
        if self._raw is not None:
            return max(0, min(self._raw.tell() - self.span.start, self.span.size))
        return int(self._share * self.span.size)

    def __iter__(self) -> Iterator[tuple[int, Content]]:
        self.source.check_unchanged()
        position = self.span.start
        try:
            records = self._texts() if self.source.format in ("lines", "text") else self._rows()
            for position, content in records:
                yield position, content
        except OSError as error:
            if error.errno is not None:  # the disk or the network, not the content
                raise
            yield position, self._damaged(error)
        except DAMAGE as error:
            yield position, self._damaged(error)
        except Exception as error:
            if type(error).__module__ != "pyarrow.lib":
                raise
            yield position, self._damaged(error)
        self.source.check_unchanged()

    def _damaged(self, error: BaseException) -> BadRecord:
        suffix = self.source.compression
        if suffix in (".gz", ".bz2", ".xz"):  # a .zst may begin with a skippable frame
            magic = COMPRESSIONS[suffix][1]
            with Path(self.source.path).open("rb") as file:
                if file.read(len(magic)) != magic:
                    return BadRecord(DAMAGED, f"the file is named {suffix} but does not begin like one")
        what = str(error) or type(error).__name__
        return BadRecord(DAMAGED, f"the file is damaged from here on ({what})")

    def _texts(self) -> Iterator[tuple[int, Content]]:
        file, self._raw = open_file(self.source)
        end = self.span.end if self.source.is_cut_in_bytes else None
        with self._raw, file:
            if self.span.start:
                file.seek(self.span.start)
            if self.source.compression and (name := other_encoding(file.peek(2**16)[: 2**16])):  # type: ignore[attr-defined]
                yield 0, BadRecord(DAMAGED, f"the file is {name}, not UTF-8: convert it by iconv")
                return
            yield from self._records(file, end)
            if end is not None and file.tell() != end:
                raise UserError(
                    f"{self.source.path} ends before byte {end}: it shrank while it was read. Restore it."
                )

    def _records(self, file: BinaryIO, end: int | None) -> Iterator[tuple[int, Content]]:
        limit = self.reading.limit
        unit = "line" if self.source.format == "lines" else self.reading.unit
        if unit == "file":
            yield 0, _whole(file, limit)
            return
        lines = _lines(file, self.span.start, end, limit)
        yield from lines if unit == "line" else _paragraphs(lines, limit)

    def _rows(self) -> Iterator[tuple[int, Content]]:
        position = 0
        batches = {"parquet": _parquet, "arrow": _arrow, "hub": _hub}[self.source.format]
        for first, share, batch in batches(self.source, self.span, self.reading.columns):
            position = position if first is None else first
            self._share = share
            for content in _contents(batch):
                yield position, content
                position += 1


def _whole(file: BinaryIO, limit: int) -> Content:
    """Return the content of a file, or a BadRecord if it is over the limit."""
    content = file.read(len(BOM) + limit + 1).removeprefix(BOM)
    size = len(content)
    while piece := file.read(PIECE):
        size += len(piece)
    return BadRecord("too_long", f"a file of {size} bytes, more than {limit}") if size > limit else content


def _lines(file: BinaryIO, offset: int, end: int | None, limit: int) -> Iterator[tuple[int, Content]]:
    """Yield (offset, line with its end); a line over the limit is a BadRecord and is never held in memory."""
    while end is None or offset < end:
        line = file.readline(limit + 2)
        if not line:
            return
        size = len(line)
        if size > limit and len(line.rstrip(b"\r\n")) > limit:
            while not line.endswith(b"\n") and (line := file.readline(PIECE)):
                size += len(line)
            yield offset, BadRecord("too_long", f"a line of {size} bytes, more than {limit}")
        else:
            yield offset, line.removeprefix(BOM) if offset == 0 else line
        offset += size


def _paragraphs(lines: Iterator[tuple[int, Content]], limit: int) -> Iterator[tuple[int, Content]]:
    """Yield (offset, text) of each run of lines between blank lines, without the last line end."""
    begun, size, held = 0, 0, bytearray()
    bad: BadRecord | None = None
    for offset, line in lines:
        assert not isinstance(line, dict)
        if isinstance(line, BadRecord) or line.strip():
            begun = begun if held or bad else offset
            bad = bad or (line if isinstance(line, BadRecord) else None)
            if bad is None:
                assert isinstance(line, bytes)
                held += line
                size = len(held)
                if size > limit + 2:
                    what = f"a paragraph, up to a blank line, of more than {limit} bytes"
                    bad = BadRecord("too_long", f"{what} (--split-documents line reads line by line)")
            if bad is not None:
                held.clear()
        elif held or bad:
            yield begun, bad or bytes(held).rstrip(b"\r\n")
            held.clear()
            bad = None
    if held or bad:
        yield begun, bad or bytes(held).rstrip(b"\r\n")


Batches = Iterator[tuple[int | None, float, Any]]  # number of the first row if known, share read, the rows


def _parquet(source: Source, span: Span, columns: Sequence[str]) -> Batches:
    import pyarrow.parquet as pq  # here and below: workers that read text start faster without it

    with pq.ParquetFile(source.path, pre_buffer=False) as file:
        groups = range(span.start, span.end)
        before = sum(file.metadata.row_group(g).num_rows for g in range(span.start))
        rows = sum(file.metadata.row_group(g).num_rows for g in groups)
        chosen = _chosen(source, file.schema_arrow.names, columns) or None
        seen = 0
        for batch in file.iter_batches(ROWS, groups, chosen, use_threads=False):
            seen += batch.num_rows
            yield before + seen - batch.num_rows, seen / rows, batch


def _arrow(source: Source, span: Span, columns: Sequence[str]) -> Batches:
    import pyarrow as pa

    seen = 0
    with pa.memory_map(source.path) as mapped:
        for batch, share in _arrow_batches(mapped, span.size):
            for first in range(0, batch.num_rows, ROWS):
                part = batch.slice(first, ROWS)
                chosen = _chosen(source, part.schema.names, columns)
                yield seen, share, part.select(chosen) if chosen else part
                seen += part.num_rows


def _chosen(source: Source, names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return which of the columns a table has; raise a `UserError` for one that it has twice."""
    for name in columns:
        if names.count(name) > 1:
            raise UserError(f"{source.path} has {names.count(name)} columns {name!r}: rename or drop one.")
    return [name for name in columns if name in names]


def _arrow_batches(mapped: Any, size: int) -> Iterator[tuple[Any, float]]:
    """Yield the batches of an IPC file, or of a stream such as `datasets` writes."""
    import pyarrow as pa

    if mapped.read(6) == b"ARROW1":
        file = pa.ipc.open_file(mapped)
        for number in range(file.num_record_batches):
            yield file.get_batch(number), (number + 1) / file.num_record_batches
        return
    mapped.seek(0)
    while mapped.tell() < size:  # several streams one behind the other, as cat makes them
        for batch in pa.ipc.open_stream(mapped):
            yield batch, mapped.tell() / size


def _hub(source: Source, span: Span, columns: Sequence[str]) -> Batches:
    assert source.hub is not None
    shard = load_hub(source.hub).as_streaming_dataset(split=source.hub.split).shard(source.size, span.start)
    for rows in shard.iter(ROWS):
        names = [name for name in columns if name in rows] or list(rows)
        yield (
            None,
            0.0,
            [dict(zip(names, row, strict=True)) for row in zip(*(rows[n] for n in names), strict=True)],
        )


def _contents(batch: Any) -> Iterator[Content]:
    """Yield the rows of a table as dictionaries; a row with invalid UTF-8 is a BadRecord."""
    if isinstance(batch, list):
        yield from batch
        return
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadRecord("invalid_utf8", f"not valid UTF-8: {error.reason}")
