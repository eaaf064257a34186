"""Files in an object store, against a store on this machine that is moto's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.base.errors import UserError
from pipeline.base.files import sha256_of
from pipeline.base.object_store import Store, Stored
from support.object_store import object_store
from support.programs import ROOT

BUCKET = "bucket"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return AWS's own client of an empty store."""
    with object_store(monkeypatch, BUCKET):
        yield boto3.client("s3")


def put(client: Any, key: str, content: bytes) -> Stored:
    client.put_object(Bucket=BUCKET, Key=key, Body=content)
    return Store().info(f"s3://{BUCKET}/{key}")


def test_what_a_url_names(client: Any) -> None:
    """An object, a glob, a folder; by name."""
    for key in ("data/b.jsonl", "data/a.jsonl", "data/deep/c.txt", "other.txt"):
        put(client, key, key.encode())
    store = Store()

    def names(url: str) -> list[str]:
        return [each.url.removeprefix(f"s3://{BUCKET}/") for each in store.find(f"s3://{BUCKET}/{url}")]

    assert names("other.txt") == ["other.txt"]
    assert names("data/*.jsonl") == ["data/a.jsonl", "data/b.jsonl"]
    assert names("data") == names("data/") == ["data/a.jsonl", "data/b.jsonl", "data/deep/c.txt"]
    assert store.has(f"s3://{BUCKET}/other.txt")
    assert not store.has(f"s3://{BUCKET}/data")


def test_a_fetch_resumes_with_what_is_missing(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure in the middle; every byte is asked for once, and the copy appears in the end."""
    monkeypatch.setattr("pipeline.base.object_store.PIECE", 1000)
    monkeypatch.setattr("pipeline.base.object_store.AHEAD", 1)
    content, path = os.urandom(9500), tmp_path / "deep/copy"
    stored, store, asked = put(client, "big", content), Store(), []
    read = store.files.cat_file

    def failing(url: str, start: int, end: int) -> bytes:
        asked.append(start)
        if asked.count(4000) == 1 and start == 4000:
            raise ConnectionError("cut")
        return read(url, start=start, end=end)

    monkeypatch.setattr(store.files, "cat_file", failing)
    with pytest.raises(UserError, match=r"s3://bucket/big: .*cut.*run the same command again"):
        store.fetch(stored, path)
    assert not path.exists()
    counts: list[int] = []
    store.fetch(stored, path, None, counts.append)
    assert path.read_bytes() == content
    assert sorted(asked) == sorted([*range(0, 9500, 1000), 4000])
    assert sum(counts) == len(content)
    assert path.stat().st_mtime == stored.changed
    asked.clear()
    store.fetch(stored, path)
    assert asked == [], "it is there"
    assert [entry.name for entry in path.parent.iterdir()] == ["copy"]


@pytest.mark.slow
def test_two_processes_that_want_one_file(client: Any, tmp_path: Path) -> None:
    """Both have it in the end, and nothing is left of the race."""
    content = os.urandom(20_000_000)
    put(client, "big", content)
    program = """
import sys
from pathlib import Path
from pipeline.base.object_store import Store
store = Store()
store.fetch(store.info(sys.argv[1]), Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", program, f"s3://{BUCKET}/big", str(tmp_path / "copy")]
    racing = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(100) for process in racing] == [0, 0]
    assert (tmp_path / "copy").read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_another_content_is_refused(client: Any, tmp_path: Path) -> None:
    """By its hash, or because it changed since it was listed; nothing is left."""
    old = put(client, "data", b"old content")
    with pytest.raises(UserError, match=r"s3://bucket/data has the sha256 .* upload it again"):
        Store().fetch(old, tmp_path / "copy", sha256="0" * 64)
    put(client, "data", b"new")
    with pytest.raises(UserError, match=r"s3://bucket/data changed while it was fetched"):
        Store().fetch(old, tmp_path / "copy")
    put(client, "data", b"new content")  # of the same size
    with pytest.raises(UserError, match=r"s3://bucket/data changed while it was fetched"):
        Store().fetch(old, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_upload_is_what_was_there(client: Any, tmp_path: Path) -> None:
    """In parts where it is large."""
    (tmp_path / "file").write_bytes(os.urandom(60_000_000))
    Store().upload(tmp_path / "file", f"s3://{BUCKET}/up")
    client.download_file(BUCKET, "up", str(tmp_path / "down"))
    assert sha256_of(tmp_path / "down") == sha256_of(tmp_path / "file")


def test_what_cannot_be_had_is_one_clear_line(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = put(client, "data", b"content")
    for url in (f"s3://{BUCKET}/none", "s3://no-bucket/x", f"s3://{BUCKET}/*.none"):
        with pytest.raises(UserError, match=rf"{url.replace('*', '.')}: .*nothing of this name"):
            Store().find(url)
    with pytest.raises(UserError, match=r"s3://no-bucket/x: .*nothing of this name"):
        Store().upload(Path(__file__), "s3://no-bucket/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"s3://bucket/data: no credentials .* AWS_PROFILE"):
        Store().find(stored.url)
