"""Reading a corpus: jsonl and txt files as records, in byte ranges that workers read on their own.

A jsonl line is a record. A txt file is cut into records at blank lines. Ranges end where records do, so every
record is in exactly one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from pipeline.cli import UserError, nearest

SUFFIXES = (".jsonl", ".json", ".txt")


@dataclass(frozen=True)
class Keys:
    """Which values of a jsonl line are read: a text, or a prompt and an answer.

    Attributes:
        names: (text,) or (prompt, answer).
    """

    names: tuple[str, ...]

    @property
    def is_pair(self) -> bool:
        """Whether records are prompt/answer pairs."""
        return len(self.names) == 2


@dataclass(frozen=True)
class Unit:
    """A byte range of one file that ends where a record does.

    Attributes:
        path: the file.
        start: first byte.
        end: byte after the last one.
    """

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Record:
    """One document.

    Attributes:
        texts: the values of `Keys.names`.
        path: the file it comes from.
        offset: the byte where it begins there.
    """

    texts: tuple[str, ...]
    path: Path
    offset: int

    @property
    def place(self) -> str:
        """Where the record is, for messages."""
        return place(self.path, self.offset)


def place(path: Path, offset: int) -> str:
    """Return ``FILE, line N`` for the line that begins at a byte offset."""
    with path.open("rb") as file:
        line = 1 + file.read(offset).count(b"\n")
    return f"{path}, line {line}"


def check_inputs(paths: Sequence[Path], keys: Keys) -> None:
    """Raise a `UserError` for the first input that is missing, or cannot hold such records."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"--input {path} does not exist, or is no file.")
        if path.suffix not in SUFFIXES:
            raise UserError(f"--input {path}: its kind is not known; use {', '.join(SUFFIXES)}.")
        if path.suffix == ".txt" and keys.is_pair:
            raise UserError(f"--input {path} is text: prompt/answer pairs come from jsonl files.")


def cut(path: Path, target_bytes: int) -> list[Unit]:
    """Return units of about `target_bytes`, or more where a record is longer, that cover the file."""
    size, units, start = path.stat().st_size, [], 0
    with path.open("rb") as file:
        while start < size:
            end = _end_of_record(file, min(size, start + target_bytes), size, path.suffix == ".txt")
            units.append(Unit(path, start, end))
            start = end
    return units


def _end_of_record(file: BinaryIO, position: int, size: int, at_blank_lines: bool) -> int:
    """Return the end of the record that holds the byte before `position`."""
    if position >= size:
        return size
    file.seek(position - 1)
    file.readline()  # to the end of the line that holds the byte
    while at_blank_lines:
        line = file.readline()
        if not line.strip():
            break
    return min(file.tell(), size)


def read(unit: Unit, keys: Keys) -> Iterator[Record]:
    """Yield the records of a unit; raise a `UserError` with file and line for one that cannot be used."""
    parts = _paragraphs(unit) if unit.path.suffix == ".txt" else _lines(unit)
    for offset, content in parts:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{place(unit.path, offset)} is not valid UTF-8: {error.reason}.") from None
        texts = (text,) if unit.path.suffix == ".txt" else _values(text, keys, unit.path, offset)
        yield Record(texts, unit.path, offset)


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of the lines that are not blank."""
    with unit.path.open("rb") as file:
        file.seek(unit.start)
        offset = unit.start
        while offset < unit.end:
            line = file.readline()
            if line.strip():
                yield offset, line
            offset += len(line)


def _paragraphs(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, text) of the runs of lines between blank lines, without the last line end."""
    begun, lines = unit.start, bytearray()
    with unit.path.open("rb") as file:
        file.seek(unit.start)
        offset = unit.start
        while offset < unit.end:
            line = file.readline()
            if line.strip():
                begun = begun if lines else offset
                lines += line
            elif lines:
                yield begun, bytes(lines).rstrip(b"\r\n")
                lines.clear()
            offset += len(line)
    if lines:
        yield begun, bytes(lines).rstrip(b"\r\n")


def _values(line: str, keys: Keys, path: Path, offset: int) -> tuple[str, ...]:
    """Return the values of a jsonl line."""
    try:
        tree: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{place(path, offset)} is not valid JSON: {error.msg}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{place(path, offset)} is no JSON object: each line must be one, such as {{...}}.")
    for key in keys.names:
        if key not in tree:
            raise UserError(
                f"{place(path, offset)} has no key {key!r}; it has {', '.join(map(repr, tree))}."
                f"{nearest(key, tree)} Name keys with --text-key, or --prompt-key and --answer-key."
            )
        if not isinstance(tree[key], str):
            kind = type(tree[key]).__name__
            raise UserError(f"{place(path, offset)}: {key!r} is of type {kind}: it must be a text.")
    if not tree[keys.names[-1]]:
        what = "an answer of length 0" if keys.is_pair else "an empty text"
        raise UserError(f"{place(path, offset)} has {what} ({keys.names[-1]!r}): remove the line.")
    return tuple(tree[key] for key in keys.names)


def read_all(paths: Iterable[Path], keys: Keys) -> Iterator[Record]:
    """Yield every record of the files, in order."""
    for path in paths:
        yield from read(Unit(path, 0, path.stat().st_size), keys)
