"""Trimming of append-only log files."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from pipeline.base.errors import UserError
from pipeline.base.files import creating_folder, keep_lines, replacing


def test_lines_are_kept_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics of a long run may exceed memory, so `keep_lines` must stream them."""
    path, left_over = tmp_path / "metrics.jsonl", tmp_path / ".metrics.jsonl.elsewhere.123.writing"
    lines = [b'{"step": %d, "text": "%s"}\n' % (step, b"x" * 1000) for step in range(3000)]
    path.write_bytes(b"".join([*lines[:10], b"\0\0\n", b"\n", *lines[10:], b'{"step": 1, "te']))
    left_over.write_bytes(b"half of it")
    tracemalloc.start()
    keep_lines(path, lambda line: orjson.loads(line)["step"] < 2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.read_bytes() == b"".join(lines[:2000])
    assert peak < 1_000_000
    assert not left_over.exists()
    assert "line 11 is damaged" in capsys.readouterr().out


def test_a_file_that_is_not_there_yet_begins_empty(tmp_path: Path) -> None:
    keep_lines(tmp_path / "metrics.jsonl", lambda _: True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_only_files_are_replaced(make: Callable[[Path], None], tmp_path: Path) -> None:
    """A device such as /dev/full would be a file from then on."""
    make(tmp_path / "x")
    before = os.lstat(tmp_path / "x").st_mode
    with (
        pytest.raises(UserError, match="x is a folder, pipe or device, not a file"),
        replacing(tmp_path / "x") as file,
    ):
        file.write(b"content")
    assert os.lstat(tmp_path / "x").st_mode == before


def test_a_folder_that_appears_meanwhile_is_no_success(tmp_path: Path) -> None:
    """Where two programs write one folder, only one of them may say so; shared contents are all alike."""
    for shared in (True, False):
        path = tmp_path / str(shared)
        refusal = contextlib.nullcontext() if shared else pytest.raises(UserError, match="by another program")
        with refusal, creating_folder(path, shared) as writing:
            (writing / "x").write_text("mine")
            path.mkdir()
            (path / "x").write_text("theirs")
        assert (path / "x").read_text() == "theirs"
        assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
