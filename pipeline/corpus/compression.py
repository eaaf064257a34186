"""Compressed files as one stream: every member or frame, to the last byte, or an error.

Python's own readers of .xz, .bz2 and .zst stop in silence at the first bytes that are no further stream, and
that of .zst refuses windows above 128 MiB. Here what cannot be read is an error in every format.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from backports import zstd

_PIECE = 2**17  # compressed bytes, and bytes of output, at a time
_GZIP = 31  # zlib's code for its largest window in a gzip wrapper
_WINDOW_LOG = 31  # of zstd --long=31, the largest that its own tool writes
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)  # and OSError without a number


class _Gzip:
    """A member of a .gz file, with the interface of the other decompressors."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(_GZIP)
        self._held = b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._inner.decompress(self._held + data, max_length)
        self._held = self._inner.unconsumed_tail
        return found

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._held

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


def _zstd() -> Any:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})


# By suffix: the decompressor of one member, and the bytes that a file begins with.
COMPRESSIONS: dict[str, tuple[Callable[[], Any], bytes]] = {
    ".gz": (_Gzip, b"\x1f\x8b"),
    ".zst": (_zstd, b"\x28\xb5\x2f\xfd"),
    ".bz2": (bz2.BZ2Decompressor, b"BZh"),
    ".xz": (lzma.LZMADecompressor, b"\xfd7zXZ\x00"),
}
PADDED = (".gz", ".xz")  # zeros between and behind members belong to these formats


class _Members(io.RawIOBase):
    """The decompressed bytes of a file.

    Reading raises one of `DAMAGE`, or an OSError, where the file ends early or holds something else.
    """

    def __init__(self, raw: BinaryIO, compression: str) -> None:
        self.raw = raw
        self.new = COMPRESSIONS[compression][0]
        self.is_padded = compression in PADDED
        self.inner: Any = None
        self.data = b""  # compressed, not yet taken by a decompressor

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.inner is not None and self.inner.eof:
                self.data, self.inner = self.inner.unused_data, None
            if self.inner is None and not self._begin():
                return 0
            if self.inner.needs_input:
                self.data = self.data or self.raw.read(_PIECE)
                if not self.data:
                    raise EOFError("it ends before the end of its compressed stream")
            data, self.data = self.data, b""
            if found := self.inner.decompress(data, len(buffer)):
                buffer[: len(found)] = found
                return len(found)

    def _begin(self) -> bool:
        """Start the next member; return whether there is one."""
        data = self.data or self.raw.read(_PIECE)
        while self.is_padded and data and not data.strip(b"\0"):
            data = self.raw.read(_PIECE)
        self.data = data.lstrip(b"\0") if self.is_padded else data
        self.inner = self.new() if self.data else None
        return bool(self.data)


def decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """Return the content of a compressed file; `raw` must be buffered, and stays open.

    Args:
        raw: the file, at its beginning.
        compression: its suffix, one of `COMPRESSIONS`.
    """
    return io.BufferedReader(_Members(raw, compression), _PIECE)
