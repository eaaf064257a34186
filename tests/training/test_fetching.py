"""Training on a dataset in an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

from pipeline.base.remote import Store
from pipeline.data.remote import fetch_dataset, upload_dataset
from pipeline.engine.build import read_weights
from support.object_store import object_store
from support.programs import Outcome

Train = Callable[..., Outcome]
URL = "s3://bucket/sets/pairs"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, data: Path) -> Iterator[Any]:
    """Return AWS's own client of a store that holds the dataset of pairs."""
    with object_store(monkeypatch, "bucket"):
        upload_dataset(data / "pairs", URL)
        yield boto3.client("s3")


def test_a_run_is_that_on_local_data(
    client: Any, train: Train, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; it resumes, and fetches nothing again."""
    cache, remote = tmp_path / "cache", ["--data.prefixes", f"[{URL}]"]
    remote += ["--data.cache", str(cache)]
    assert train(tmp_path / "local").code == 0
    assert train(tmp_path / "run", "--train.steps", "16", *remote).code == 0
    for suffix in (".bin", ".idx", ".json"):
        copy = cache / f"bucket/sets/pairs{suffix}"
        assert copy.read_bytes() == (data / f"pairs{suffix}").read_bytes()
    last = "checkpoints/step_00000016"
    (tmp_path / "run" / last).rename(tmp_path / "lost")
    monkeypatch.setattr(Store, "fetch", lambda *arguments: pytest.fail("fetched again"))
    assert train(tmp_path / "run", *remote).code == 0, "resumed after step 12"
    expected = read_weights(tmp_path / "local" / last / "model")
    for folder in (tmp_path / "run" / last, tmp_path / "lost"):
        for name, weight in read_weights(folder / "model").items():
            assert torch.equal(weight, expected[name]), name
    assert f"- {URL}" in (tmp_path / "run/config.yaml").read_text()


def test_a_damaged_dataset_is_refused(client: Any, train: Train, data: Path, tmp_path: Path) -> None:
    """By the hash in its metadata, in one line; with the right file the same command works."""
    content = bytearray((data / "pairs.bin").read_bytes())
    content[100] ^= 1
    client.put_object(Bucket="bucket", Key="sets/pairs.bin", Body=bytes(content))
    run = [
        tmp_path / "run",
        "--data.prefixes",
        f"[{URL}]",
        "--train.steps",
        "3",
        "--evaluation.interval",
        "0",
    ]
    refused = train(*run).complaint()
    assert "s3://bucket/sets/pairs.bin has the sha256" in refused
    assert not list(tmp_path.rglob("pairs.bin"))
    client.upload_file(str(data / "pairs.bin"), "bucket", "sets/pairs.bin")
    assert train(*run).code == 0


def test_a_dataset_that_was_replaced_is_fetched_again(
    client: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_dataset(Store(), URL, tmp_path / "copy")
    (tmp_path / "copy.json").write_text("{}")  # as if it were that of another one
    fetch_dataset(Store(), URL, tmp_path / "copy")
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == (data / f"pairs{suffix}").read_bytes()
