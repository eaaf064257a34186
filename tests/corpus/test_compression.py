"""Compressed files: every frame to the last byte, or an error; the libraries' own writers are the oracle."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import EXIT_DONE, EXIT_LOST_DATA
from pipeline.corpus.compression import DAMAGE, PADDED, decompressed
from pipeline.data.facts import read_facts
from support.corpora import command
from support.programs import run_here
from tools import inspect_data, preprocess_data

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(content: bytes, suffix: str) -> bytes:
    return decompressed(io.BufferedReader(io.BytesIO(content)), suffix).read()


@pytest.mark.parametrize("suffix", COMPRESS)
@settings(deadline=None, max_examples=30)
@given(parts=st.lists(st.binary(max_size=4000), max_size=4), times=st.sampled_from([1, 300]))
def test_members_one_behind_the_other_are_read(suffix: str, parts: list[bytes], times: int) -> None:
    parts = [part * times for part in parts]
    content = b"".join(map(COMPRESS[suffix], parts))
    assert read(content, suffix) == b"".join(parts)
    if suffix in PADDED:
        padding = b"\0" * 4 * 2**16
        assert read(padding.join(map(COMPRESS[suffix], parts)) + padding, suffix) == b"".join(parts)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_is_cut_off_or_something_else_is_an_error(suffix: str) -> None:
    """Python's own readers stop in silence at what follows a stream in .xz, .bz2 and .zst."""
    sound = COMPRESS[suffix](b"some text\n" * 999)
    for content in (sound[:-1], sound[:9], sound + b"plain", sound + sound[:-3], b"plain text"):
        with pytest.raises((OSError, *DAMAGE)):
            read(content, suffix)
    assert read(b"", suffix) == b""


def test_frames_of_zstd_of_every_kind() -> None:
    """A window above 2^27, as zstd --long=31 writes; skippable frames, as pzstd writes; without a size."""
    text = b"a line of text\n" * 9999
    parameter = zstd.CompressionParameter
    for window in (27, 28, 30, 31):
        options = {parameter.window_log: window, parameter.enable_long_distance_matching: 1}
        compressor = zstd.ZstdCompressor(options=options)
        content = compressor.compress(text) + compressor.flush()
        assert read(content, ".zst") == text
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    frame = zstd.compress(text)
    assert read(skippable + frame + skippable + frame + skippable, ".zst") == text * 2


@pytest.mark.slow
def test_damaged_files_count_by_their_bytes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine of ten files: an error; one small one: an exit code of its own, which can be turned off."""
    good = corpus / "x.jsonl"
    for number in range(9):
        (tmp_path / f"f{number}.jsonl.gz").write_bytes(good.read_bytes())
    inputs = [good, f"{tmp_path}/f*.jsonl.gz"]
    complaint = run_here(
        preprocess_data.main, command(corpus, tmp_path / "d", inputs=inputs), capsys
    ).complaint()
    size = good.stat().st_size
    assert f"of {10 * size:,} bytes are in files that cannot be read to their end" in complaint
    assert "the file is named .gz but does not begin like one" in complaint
    for name, content in (
        ("half.jsonl.gz", gzip.compress(good.read_bytes())[:400]),
        ("half.jsonl.xz", lzma.compress(good.read_bytes())[:400]),
        ("half.jsonl.zst", zstd.compress(good.read_bytes())[:400]),
        ("more.jsonl.bz2", bz2.compress(good.read_bytes()) + b"and more"),
        ("utf16.jsonl.gz", gzip.compress(good.read_bytes().decode().encode("utf-16"))),
    ):
        path, prefix = tmp_path / name, tmp_path / f"d_{name}"
        path.write_bytes(content)
        arguments = command(corpus, prefix, inputs=[path])
        assert "bytes are in files" in run_here(preprocess_data.main, arguments, capsys).complaint()
        many = ("--max-bad-fraction", "0.5")
        arguments = command(corpus, tmp_path / f"e_{name}", *many, inputs=[good, path])
        outcome = run_here(preprocess_data.main, arguments, capsys)
        assert outcome.code == EXIT_LOST_DATA, outcome.error
        assert "exit code 3 (--accept-lost-files: 0)" in outcome.output
        counts = read_facts(tmp_path / f"e_{name}").counts
        assert counts.lost_bytes == len(content)
        assert counts.quarantined["damaged_file"] == 1
        again = run_here(preprocess_data.main, arguments, capsys)  # nothing to do, and still not whole
        assert again.code == EXIT_LOST_DATA
        assert "nothing to do: " in again.output
        assert run_here(preprocess_data.main, [*arguments, "--accept-lost-files"], capsys).code == EXIT_DONE


@pytest.mark.slow
def test_files_of_no_bytes_are_empty(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every compression, without loss; alone they are one clear line."""
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt.bz2", "e.txt.xz", "f.arrow"]
    for name in names:
        (tmp_path / name).touch()
        arguments = command(corpus, tmp_path / f"d_{name}", inputs=[tmp_path / name])
        assert f"{name}: no document in it" in run_here(preprocess_data.main, arguments, capsys).complaint()
    inputs = [corpus / "x.jsonl", *(tmp_path / name for name in names)]
    outcome = run_here(preprocess_data.main, command(corpus, tmp_path / "d", inputs=inputs), capsys)
    assert outcome.code == EXIT_DONE, outcome.error
    assert f"6 of 7 files have 0 bytes, the first: {tmp_path}/a.jsonl" in outcome.output
    assert json.loads((tmp_path / "d.json").read_text())["counts"]["lost_bytes"] == 0
    assert run_here(inspect_data.main, [str(tmp_path / "d"), "--verify"], capsys).code == EXIT_DONE
