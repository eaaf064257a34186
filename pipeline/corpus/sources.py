"""The inputs of a corpus: files by path, glob, folder or list, and datasets that Hugging Face streams."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pipeline.base.errors import UserError
from pipeline.base.extras import extra
from pipeline.base.object_store import is_remote
from pipeline.corpus.compression import COMPRESSIONS, decompressed

Format = Literal["lines", "text", "parquet", "arrow", "hub"]
FORMATS: dict[str, Format] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
KNOWN = f"{', '.join(FORMATS)}; the first four also with {', '.join(COMPRESSIONS)}"
_ENDS = 2**16  # bytes hashed at the head and at the tail
_SUFFIXES = 5  # of skipped files, named in the message


@dataclass(frozen=True)
class Hub:
    """A dataset that `datasets` streams.

    Attributes:
        name: of the dataset on the hub, or a local folder of data files.
        config: its configuration, if it has several.
        split: the split to read.
        revision: commit or tag on the hub.
    """

    name: str
    config: str | None
    split: str
    revision: str | None


@dataclass(frozen=True)
class Source:
    """One input, as it was when preprocessing began.

    Attributes:
        path: of the file, absolute; or the name of a streamed dataset.
        format: of its content.
        compression: suffix of the compression, or empty.
        size: in bytes; for a streamed dataset, in shards.
        mtime_ns: time of the last change; 0 for a streamed dataset.
        ends: sha256 of size, head and tail; for a streamed dataset, its fingerprint.
        hub: how to load a streamed dataset.
    """

    path: str
    format: Format
    compression: str
    size: int
    mtime_ns: int
    ends: str
    hub: Hub | None = None

    @property
    def is_cut_in_bytes(self) -> bool:
        """Whether a span is a byte range."""
        return self.format in ("lines", "text") and not self.compression

    @classmethod
    def of_file(cls, path: Path) -> Source:
        """Return the source of a file.

        Raises:
            UserError: if it is missing, of an unknown type or no UTF-8.
        """
        if not path.is_file():
            if path.exists() and not path.is_dir():
                raise UserError(
                    f"{path} is a pipe, socket or device: name a file; a corpus can be piped to --input -."
                )
            raise UserError(f"{path} does not exist or is not a file: check the path.")
        found = format_of(path)
        if found is None:
            raise UserError(f"{path}: unknown file type; use {KNOWN}.")
        facts = path.stat()
        head, digest = _ends(path, facts.st_size)
        if found in (("lines", ""), ("text", "")) and (name := other_encoding(head)):
            raise UserError(f"{path} is {name}, not UTF-8: convert it, iconv -f {name} -t UTF-8.")
        return cls(os.path.abspath(path), *found, facts.st_size, facts.st_mtime_ns, digest)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Source:
        """Return the source from its `asdict`."""
        hub = values.pop("hub")
        return cls(**values, hub=Hub(**hub) if hub else None)

    def check_unchanged(self) -> None:
        """Raise a `UserError` if the file is gone, or if its size or time changed."""
        if self.hub is not None:
            return
        try:
            facts = Path(self.path).stat()
        except FileNotFoundError:
            raise UserError(
                f"{self.path} has disappeared: restore it and run the same command again. Finished parts are "
                "kept."
            ) from None
        if (facts.st_size, facts.st_mtime_ns) != (self.size, self.mtime_ns):
            raise UserError(
                f"{self.path} has changed since preprocessing began (size {self.size}, now {facts.st_size}): "
                "restore the old file, or start over with --restart."
            )


def format_of(path: Path) -> tuple[Format, str] | None:
    """Return format and compression by the file's suffixes, upper or lower case; None if unknown."""
    path = Path(path.name.lower())
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    found = FORMATS.get(path.with_suffix("").suffix if compression else path.suffix)
    if found is None or (compression and found not in ("lines", "text")):
        return None
    return found, compression


def other_encoding(head: bytes) -> str | None:
    """Return the name if `head` begins a text in UTF-16 or UTF-32, with or without a byte-order mark."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    for name, zeros in (
        ("UTF-32LE", (1, 2, 3)),
        ("UTF-32BE", (0, 1, 2)),
        ("UTF-16LE", (1,)),
        ("UTF-16BE", (0,)),
    ):
        width = 4 if "32" in name else 2
        shares = [head[first::width].count(0) * width / max(1, len(head)) for first in range(width)]
        # A file system leaves a block of zeros behind a crash: those are in every place alike.
        if all((share > 0.5) if first in zeros else (share < 0.25) for first, share in enumerate(shares)):
            return name
    return None


def _ends(path: Path, size: int) -> tuple[bytes, str]:
    """Return the head of a file, and a hash of size, head and tail."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        head = file.read(_ENDS)
        digest.update(head)
        file.seek(max(0, size - _ENDS))
        digest.update(file.read(_ENDS))
    return head, digest.hexdigest()


def find(inputs: Sequence[str]) -> list[Path]:
    """Return the files of the inputs, in order; report on stderr what was skipped in folders.

    An input is a file, a glob (``data/**/*.jsonl.zst``), a folder (every file of a known type below it, by
    name; the data files of a dataset saved by `datasets`, in its order) or ``@LIST``, a file with one input
    per line.

    Raises:
        UserError: for an input without a file, or a file given twice.
    """
    skipped: list[Path] = []
    files: dict[str, tuple[Path, str]] = {}  # by real path: the file, and the input that gave it
    for given, path in _expanded(inputs, skipped):
        file, before = files.setdefault(os.path.realpath(path), (path, given))
        if file is not path:
            raise UserError(
                f"--input: {path} is given twice, by {before} and by {given}: its documents would be "
                "duplicated. Remove one."
            )
    if skipped:
        print(f"skipped files of unknown types: {_suffixes(skipped)}. Known types: {KNOWN}.", file=sys.stderr)
    return [path for path, _ in files.values()]


def _expanded(
    inputs: Sequence[str], skipped: list[Path], lists: tuple[str, ...] = ()
) -> Iterator[tuple[str, Path]]:
    """Yield (input, file) for every file; add unknown files of folders to `skipped`.

    `lists` are the lists around the inputs: a list that contains itself is refused.
    """
    for given in inputs:
        path = Path(given)
        if is_remote(given):
            raise UserError(f"{given}: this input cannot be in an object store: name a local copy.")
        if given in lists:
            raise UserError(f"--input {given}: the list contains itself: remove that line.")
        if given.startswith("@"):
            yield from _expanded(_read_list(Path(given[1:])), skipped, (*lists, given))
        elif path.is_dir():
            yield from ((given, file) for file in _files_of_folder(path, skipped))
        elif not path.exists() and glob.has_magic(given):
            found = _only_files(Path(match) for match in sorted(glob.glob(given, recursive=True)))
            if not found:
                raise UserError(f"--input {given}: no file matches.")
            yield from ((given, file) for file in found)
        else:
            yield given, path


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"--input @{path}: the list {path} does not exist or is not a file.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # names may hold U+2028 and the like
    except UnicodeDecodeError as error:
        raise UserError(f"--input @{path}: the list is not UTF-8 ({error.reason}): convert it.") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"--input @{path}: the list is empty: write one input a line.")
    return found


def _files_of_folder(folder: Path, skipped: list[Path]) -> list[Path]:
    state = folder / "state.json"
    if state.is_file() and (folder / "dataset_info.json").is_file():
        try:
            return [folder / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{state} is damaged ({error}): save the dataset again.") from None
    if (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"--input {folder} holds several splits: name the folder of one, such as {folder}/train."
        )
    files = sorted(_only_files(_below(folder)))
    known = [path for path in files if format_of(path) is not None]
    unknown = [path for path in files if format_of(path) is None]
    if not known:
        there = f" ({_suffixes(unknown)})" if unknown else ""
        raise UserError(f"--input {folder} holds no file of a known type{there}; use {KNOWN}.")
    skipped += unknown
    return known


def _below(folder: Path) -> Iterator[Path]:
    """Yield what is below a folder and not hidden; follow links, except those back to a folder around them.

    Raises:
        OSError: for a folder that cannot be read: its documents would be lost.
    """

    def fail(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        around = os.path.realpath(root)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not is_around(os.path.realpath(os.path.join(root, name)), around)
        ]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def is_around(outer: str, inner: str) -> bool:
    """Return whether real path `outer` is `inner` or a folder around it."""
    return os.path.commonpath([outer, inner]) == outer


def _only_files(paths: Iterable[Path]) -> list[Path]:
    """Return the paths that are files; raise a `UserError` for a broken link, or a pipe of a known type."""
    files = []
    for path in paths:
        if path.is_file():
            files.append(path)
        elif path.is_symlink() and not path.exists():
            raise UserError(f"--input {path} is a broken link: restore its file, or remove the link.")
        elif not path.is_dir() and format_of(path) is not None:
            raise UserError(f"--input {path} is a pipe, socket or device: remove it, or name the files.")
    return files


def _suffixes(files: Sequence[Path]) -> str:
    """Return the number of files of each suffix: ``3 .json.lz4, 1 .md``; the rarest as ``others``."""
    counts: Counter[str] = Counter()
    for path in files:
        inner = Path(path.stem).suffix
        named = inner if inner.lower() in FORMATS or path.suffix.lower() in COMPRESSIONS else ""
        counts[f"{named}{path.suffix}" or "without a suffix"] += 1
    first = [f"{count} {kind}" for kind, count in counts.most_common(_SUFFIXES)]
    others = len(files) - sum(count for _, count in counts.most_common(_SUFFIXES))
    return ", ".join(first + ([f"{others} others"] if others else []))


def open_file(source: Source) -> tuple[BinaryIO, BinaryIO]:
    """Return a file of text, decompressed, and the raw file under it, whose position shows progress."""
    raw: BinaryIO = Path(source.path).open("rb", buffering=2**18)  # noqa: SIM115  the caller closes both
    if not source.compression:
        return raw, raw
    return decompressed(raw, source.compression), raw


@functools.cache
def load_hub(hub: Hub) -> Any:
    """Return the builder of a dataset; raise a `UserError` if `datasets` cannot load it or its split."""
    with extra("hub", "--hub-dataset"):
        import datasets  # slow to import, and most corpora are files

    try:
        builder = datasets.load_dataset_builder(hub.name, hub.config, revision=hub.revision)
        builder.as_streaming_dataset(split=hub.split)
    except Exception as error:  # errors of `datasets`, the hub or the network
        raise UserError(
            f"--hub-dataset {hub.name} cannot be loaded ({type(error).__name__}: {error}): check its name, "
            "--hub-config, --hub-split and --hub-revision."
        ) from None
    return builder


def hub_source(hub: Hub) -> Source:
    """Return the source of a streamed dataset.

    Its fingerprint covers its data files: on the hub their URLs, which contain the commit; locally also sizes
    and times.
    """
    builder = load_hub(hub)
    files = []
    for path in map(str, (builder.config.data_files or {}).get(hub.split, [])):
        facts = Path(path).stat() if Path(path).is_file() else None
        files.append([path, facts.st_size, facts.st_mtime_ns] if facts else [path])
    fingerprint = hashlib.sha256(json.dumps([asdict(hub), files]).encode()).hexdigest()
    shards = builder.as_streaming_dataset(split=hub.split).num_shards
    return Source(hub.name, "hub", "", shards, 0, fingerprint, hub)
