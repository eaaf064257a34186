"""Preprocessing from and to an object store, against the same on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from support.object_store import object_store
from support.programs import run_here
from tools import preprocess_data

KEYS = ["--prompt-key", "q", "--answer-key", "a", "--workers", "1"]
URL = "s3://bucket/sets/ours"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> Iterator[Any]:
    """Return AWS's own client of a store that holds the corpus."""
    with object_store(monkeypatch, "bucket"):
        client = boto3.client("s3")
        for number in range(2):
            client.upload_file(str(corpus / "x.jsonl"), "bucket", f"corpus/{number}.jsonl")
        client.put_object(Bucket="bucket", Key="corpus/README.md", Body=b"of no known type")
        yield client


@pytest.mark.slow
def test_from_a_store_to_a_store(
    client: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes of a dataset made from local files; run again there is nothing to do."""
    tokenizer = ["--tokenizer", str(corpus / "tokenizer")]
    remote = ["--input", "s3://bucket/corpus", "--output-prefix", URL]
    remote += ["--local-folder", str(tmp_path / "disk")]
    copies = [str(corpus / "x.jsonl"), str(tmp_path / "x.jsonl")]
    (tmp_path / "x.jsonl").write_bytes((corpus / "x.jsonl").read_bytes())
    local = ["--input", *copies, "--output-prefix", str(tmp_path / "local")]
    for where in (remote, local):
        assert run_here(preprocess_data.main, [*where, *tokenizer, *KEYS], capsys).code == 0
    for suffix in (".bin", ".idx"):
        client.download_file("bucket", "sets/ours" + suffix, str(tmp_path / "down"))
        assert (tmp_path / "down").read_bytes() == (tmp_path / f"local{suffix}").read_bytes()
    again = run_here(preprocess_data.main, [*remote, *tokenizer, *KEYS], capsys)
    assert again.code == 0
    assert "nothing to do" in again.output
    assert "uploading" not in again.output

    other = [*remote[:4], "--local-folder", str(tmp_path / "elsewhere"), *tokenizer, *KEYS, "--append-eos"]
    refused = run_here(preprocess_data.main, other, capsys)
    assert "s3://bucket/sets/ours exists: give --overwrite" in refused.complaint()
    assert not (tmp_path / "elsewhere").exists(), "before any work"
    replaced = run_here(preprocess_data.main, [*other, "--overwrite"], capsys)
    assert replaced.code == 0
    client.download_file("bucket", "sets/ours.bin", str(tmp_path / "down"))
    assert (tmp_path / "down").read_bytes() != (tmp_path / "local.bin").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--input", "s3://bucket/corpus", "--output-prefix", "x"], "--local-folder is missing"),
        (["--input", "x.jsonl", "--output-prefix", URL], "--local-folder is missing"),
        (["--input", "x", "--output-prefix", "y", "--local-folder", "d"], "--local-folder d is for s3://"),
        (
            ["--input", "s3://bucket/no", "--output-prefix", "x", "--local-folder", "d"],
            "nothing of this name",
        ),
        (
            ["--input", "s3://bucket/corpus/README*", "--output-prefix", "x", "--local-folder", "d"],
            "no file of a known type",
        ),
        (
            ["--input", "x", "--output-prefix", URL, "--local-folder", "d", "--num-shards", "2"],
            "tools/merge_datasets.py",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    client: Any,
    corpus: Path,
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = str(corpus / "tokenizer")
    refused = run_here(
        preprocess_data.main, [*arguments, "--tokenizer", tokenizer, *KEYS], capsys
    ).complaint()
    assert "s3://" in refused
    assert complaint in refused
