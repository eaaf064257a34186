"""Files in an S3-compatible object store: fetched whole and resumable, uploaded whole.

Credentials and the address of the store are those of AWS's own tools: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.base.errors import UserError
from pipeline.base.extras import extra
from pipeline.base.files import sync_folder

SCHEME = "s3://"
PIECE = 2**24  # bytes of one request
AHEAD = 8  # requests at a time
Count = Callable[[int], None]


def is_remote(path: str | Path) -> bool:
    """Return whether `path` names something in an object store."""
    return str(path).startswith(SCHEME)


def place_of(url: str, folder: Path) -> Path:
    """Return where in `folder` an object is kept: by bucket and key."""
    return folder / url.removeprefix(SCHEME)


@dataclass(frozen=True)
class Stored:
    """An object of a store.

    Attributes:
        url: its name, s3://BUCKET/KEY.
        size: bytes.
        version: changes with the content.
        changed: time of the last change, in whole seconds since 1970.
    """

    url: str
    size: int
    version: str
    changed: int

    def is_at(self, path: Path) -> bool:
        """Return whether `fetch` has made `path`: by size and time."""
        facts = path.stat() if path.exists() else None
        return facts is not None and (facts.st_size, facts.st_mtime) == (self.size, self.changed)


class Store:
    """An S3-compatible object store.

    Every method raises a `UserError` with the URL: for missing credentials or permissions, something that
    does not exist, and a store that does not answer.
    """

    def __init__(self) -> None:
        """Open nothing yet: the first request connects."""
        with extra("s3", "s3://"):
            import s3fs

        # Uploaded a moment ago, by another process: a listing must not be an old one.
        self.files: Any = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)

    def find(self, url: str) -> list[Stored]:
        """Return the objects that `url` names, by name: one, those of a glob, or all below a folder."""
        with _explained(url):
            if glob.has_magic(url):
                found = self.files.glob(url, detail=True)
            else:
                found = self.files.find(url, detail=True)
        if not found:
            raise UserError(f"{url}: the object store has nothing of this name: check bucket and path.")
        return [_stored(info) for _, info in sorted(found.items()) if info["type"] == "file"]

    def info(self, url: str) -> Stored:
        """Return one object."""
        with _explained(url):
            return _stored(self.files.info(url))

    def has(self, url: str) -> bool:
        """Return whether there is such an object."""
        with _explained(url):
            there: bool = self.files.isfile(url)
        return there

    def read(self, url: str) -> bytes:
        """Return the content of a small object."""
        with _explained(url):
            content: bytes = self.files.cat_file(url)
        return content

    def fetch(
        self, stored: Stored, path: Path, sha256: str | None = None, count: Count = lambda _: None
    ) -> None:
        """Make `path` a copy of an object, unless it is one. What an interrupted attempt fetched is kept.

        The copy appears by one rename. A second process that wants the same file waits for the first.

        Args:
            stored: the object.
            path: the copy; it gets the object's time.
            sha256: what the content must have, if known.
            count: hears of the bytes as they arrive, those of an earlier attempt included.

        Raises:
            UserError: for another content, or an object that changed on the way.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(f"{stored.url} {stored.version} {stored.size}".encode()).hexdigest()[:16]
        partial = path.with_name(f".{path.name}.{name}.fetching")
        with partial.open("a+b") as file:
            _lock(file, path)
            if stored.is_at(path):
                partial.unlink(missing_ok=True)
                count(stored.size)
                return
            digest = self._complete(stored, file, count)
            os.fsync(file.fileno())
            if self.info(stored.url) != stored:
                partial.unlink(missing_ok=True)
                raise UserError(f"{stored.url} changed while it was fetched: run the same command again.")
            if sha256 not in (None, digest):
                partial.unlink(missing_ok=True)
                raise UserError(
                    f"{stored.url} has the sha256 {digest[:12]}, not {str(sha256)[:12]} as its metadata say: "
                    "upload it again."
                )
            os.utime(partial, (stored.changed, stored.changed))
            partial.replace(path)
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.fetching"):  # of other versions
                left.unlink(missing_ok=True)
            sync_folder(path.parent)

    def _complete(self, stored: Stored, file: BinaryIO, count: Count) -> str:
        """Append what is missing of an object; return the hash of all of it."""
        digest = hashlib.sha256()
        file.seek(0)
        while piece := file.read(PIECE):
            digest.update(piece)
            count(len(piece))
        starts = deque(range(file.tell(), stored.size, PIECE))
        waiting: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(AHEAD, "fetch") as pool:
            while starts or waiting:
                while starts and len(waiting) < AHEAD:
                    waiting.append(pool.submit(self._piece, stored, starts.popleft()))
                piece = waiting.popleft().result()
                file.write(piece)
                digest.update(piece)
                count(len(piece))
        file.flush()
        return digest.hexdigest()

    def _piece(self, stored: Stored, start: int) -> bytes:
        end = min(start + PIECE, stored.size)
        with _explained(stored.url):
            piece: bytes = self.files.cat_file(stored.url, start=start, end=end)
        if len(piece) != end - start:
            raise UserError(f"{stored.url} changed while it was fetched: run the same command again.")
        return piece

    def upload(self, path: Path, url: str) -> None:
        """Make `url` a copy of a file; it appears whole, in place of an older one."""
        with _explained(url):
            self.files.put_file(str(path), url)
            size = self.files.info(url)["size"]
        if size != path.stat().st_size:
            raise UserError(f"{url} has {size} bytes after the upload of {path}: run the same command again.")


def _lock(file: BinaryIO, path: Path) -> None:
    """Wait until no other process fetches the file."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"{path.parent} is on a file system without locks ({error.strerror}): fetch to a folder on a "
            "local disk."
        ) from None


def _stored(info: dict[str, Any]) -> Stored:
    # A listing of some stores knows fractions of a second, an answer about one object does not.
    changed = int(info["LastModified"].timestamp())
    return Stored(SCHEME + info["name"], info["size"], info["ETag"], changed)


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a request raises into one line; the block reads and writes no local file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{url}: the object store has nothing of this name: check bucket and path.") from None
    except PermissionError as error:
        raise UserError(f"{url}: the object store refuses access ({error}): check the credentials.") from None
    except Exception as error:  # of botocore, aiohttp or the network
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            raise UserError(
                f"{url}: no credentials for the object store: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
            ) from None
        raise UserError(
            f"{url}: the object store does not answer as it should ({type(error).__name__}: {error}): check "
            "AWS_ENDPOINT_URL and the network, and run the same command again; what was fetched is kept."
        ) from error
