"""Files and folders that exist whole or not at all, and are known by their content."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from pipeline.base.errors import UserError

_CHUNK = 1 << 22  # bytes


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path`, on the disk, when the block ends without an error.

    Parent folders are made. After an error nothing is left behind and an older file is untouched.

    Raises:
        OSError: when the file cannot be written, with its path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = _writing(path)
    try:
        with writing.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # a full disk is found by the file, which does not say its name
            error.filename = str(path)
        raise
    finally:
        writing.unlink(missing_ok=True)


@contextmanager
def creating_folder(path: Path) -> Iterator[Path]:
    """Make a folder that appears as `path`, with its files on the disk, when the block ends without an error.

    Several processes, also on several machines, may make the same folder: the first one stays, the work of
    the others is dropped. So it is for contents that are the same whoever makes them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = _writing(path)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    try:
        yield writing
        sync_tree(writing)
        try:
            writing.rename(path)
        except OSError:  # a folder that is not empty is never replaced
            if not path.is_dir():
                raise
        sync_folder(path.parent)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _writing(path: Path) -> Path:
    """Return the name of `path` while it is being written, which no other process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.writing")


def remove_left_overs(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.writing"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Write at the end of a file: all of `content` or, after an error, nothing.

    Raises:
        OSError: when it cannot be written, with its path.
    """
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            _write_all(file, content)
        except OSError as error:
            with suppress(OSError):
                file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from None


def keep_lines(path: Path, wanted: Callable[[bytes], bool]) -> None:
    """Drop the lines of a file that are not `wanted`, and half a line that a killed process left.

    A line that `wanted` cannot read as JSON, as a machine that lost its power may leave, is dropped, and this
    is said.
    """
    remove_left_overs(path)
    with replacing(path) as kept, path.open("rb") if path.exists() else io.BytesIO() as file:
        for number, line in enumerate(file, 1):  # one at a time: a long run has gigabytes of them
            try:
                if line.endswith(b"\n") and line.strip() and wanted(line):
                    kept.write(line)
            except orjson.JSONDecodeError as error:
                print(f"{path}, line {number} is damaged ({error}) and left out", flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file that may still be written to: the last half line does not count.

    Raises:
        UserError: for a line that is damaged.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], 1):
        try:
            found.append(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not valid JSON ({error}): remove the line.") from None
    return found


@dataclass(frozen=True)
class FileFacts:
    """What a file must be like to be the one that was written.

    Attributes:
        size: bytes.
        sha256: of the content, in hexadecimal.
    """

    size: int
    sha256: str


def _write_all(file: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:  # one call writes at most 2 GB, and what a disk has room for
        left = left[file.write(left) :]


class _Hashing:
    """A writable file that hashes what passes through it."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Write and hash; other threads run meanwhile."""
        self.digest.update(content)
        try:
            _write_all(self.file, content)
        except OSError as error:
            self.error = error
            raise
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self.file.flush()


def write_hashed(path: Path, write: Callable[[BinaryIO], object]) -> FileFacts:
    """Write a new file by `write(file)`, hash it on the way, and return when it is on the disk.

    Raises:
        OSError: when it cannot be written, with its path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        hashing = _Hashing(file)
        try:
            write(cast(BinaryIO, hashing))
            os.fsync(file.fileno())
        except Exception as error:
            cause = hashing.error or error  # torch.save reports a full disk as a defect of its own
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from None
            raise
    return FileFacts(hashing.size, hashing.digest.hexdigest())


def sha256_of(path: Path) -> str:
    """Return the hash of an existing file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """See to it that the entries of a folder are on the disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(top: Path) -> None:
    """See to it that a folder is on the disk with all that is below it."""
    for path in top.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            _sync(path, os.O_RDONLY)
    sync_folder(top)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
