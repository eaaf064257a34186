"""Atomic files and folders, append-only logs and content hashes."""

from __future__ import annotations

import glob
import hashlib
import io
import json
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
    """Open a temporary file that replaces `path`, synced to disk, when the block ends without an error.

    Create parent folders. After an error the temporary file is removed and an older file is unchanged.

    Raises:
        OSError: with the path, when the file cannot be written.
        UserError: for a folder, pipe or device, which a file must not replace.
    """
    require_file(path)
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
        if error.filename is None:  # ENOSPC from write() carries no file name
            error.filename = str(path)
        raise
    finally:
        writing.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file as `replacing` does, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Write plain values as JSON, as `replacing` does."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def creating_folder(path: Path, shared: bool = True) -> Iterator[Path]:
    """Create a folder that appears as `path`, synced to disk, when the block ends without an error.

    Several processes and machines may create the same folder: the first one wins, the others are discarded.

    Args:
        path: of the folder.
        shared: the contents do not depend on who writes them; otherwise the others raise a `UserError`.
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
        except OSError:  # rename never replaces a folder that is not empty
            if not path.is_dir():
                raise
            if not shared:
                raise UserError(
                    f"{path} was written by another program meanwhile, and this result is dropped: name "
                    "another folder."
                ) from None
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # ENOSPC from write() carries no file name
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def require_file(path: Path) -> None:
    """Raise a `UserError` for a folder, pipe or device at `path`; a missing file will do."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder, pipe or device, not a file: name another path.")


def require_new(output: Path) -> None:
    """Raise a `UserError` if the folder to create is there already, or is a link to nowhere."""
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output} exists: remove it, or name another folder.")


def _writing(path: Path) -> Path:
    """Return a temporary name for `path` that no other process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.writing")


def remove_left_overs(path: Path) -> None:
    """Remove the temporary files of processes that were killed while writing `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.writing"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Append all of `content` to a file, or nothing on an error.

    Raises:
        OSError: with the path, when the file cannot be written.
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
    """Drop the lines of a file that are not `wanted`, and a partial last line.

    A line that is not valid JSON for `wanted`, such as after a power loss, is reported and dropped.
    """
    remove_left_overs(path)
    with replacing(path) as kept, path.open("rb") if path.exists() else io.BytesIO() as file:
        for number, line in enumerate(file, 1):  # streamed: a long run writes gigabytes
            try:
                if line.endswith(b"\n") and line.strip() and wanted(line):
                    kept.write(line)
            except orjson.JSONDecodeError as error:
                print(f"{path}, line {number} is damaged ({error}): dropped", flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file that may still be growing; ignore a partial last line.

    Raises:
        UserError: for a damaged line.
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
    """Size and hash that identify the content of a file.

    Attributes:
        size: bytes.
        sha256: of the content, in hexadecimal.
    """

    size: int
    sha256: str


def _write_all(file: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:  # one call writes at most 2 GB, or less on a nearly full disk
        left = left[file.write(left) :]


class _Hashing:
    """A writable file that hashes everything written to it."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Write and hash; both release the GIL."""
        self.digest.update(content)
        try:
            _write_all(self.file, content)
        except OSError as error:
            self.error = error
            raise
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def write_hashed(path: Path, write: Callable[[BinaryIO], object]) -> FileFacts:
    """Write a file through `write(file)`, hash it while writing, and return once it is synced to disk.

    Raises:
        OSError: with the path, when the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        hashing = _Hashing(file)
        try:
            write(cast(BinaryIO, hashing))
            os.fsync(file.fileno())
        except Exception as error:
            cause = hashing.error or error  # torch.save hides a full disk behind a RuntimeError
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from None
            raise
    return FileFacts(hashing.size, hashing.digest.hexdigest())


def sha256_of(path: Path, count: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal; `count` hears of the bytes as they are read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if count is not None:
                count(len(chunk))
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder to disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(top: Path) -> None:
    """Sync a folder and everything below it to disk."""
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
