"""Training on a dataset in an object store."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import boto3
import numpy as np
import pytest
import torch

from pipeline.base.errors import EXIT_BAD_INPUT
from pipeline.base.object_store import Store
from pipeline.data.remote import fetch_dataset, upload_dataset
from support.fetch_dataset import PIECE
from support.forked import run_forked
from support.object_store import object_store
from support.programs import Outcome
from support.weights import read_weights

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


Requests = dict[str, list[str]]


class Nodes:
    """Two nodes of two ranks that fetch a dataset of 13 and 2 pieces."""

    url = "s3://bucket/sets/large"

    def __init__(self, client: Any, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        random = np.random.default_rng(0)
        self.content = {"bin": random.bytes(200_000), "idx": random.bytes(20_000)}
        facts = {"sha256": {name: hashlib.sha256(part).hexdigest() for name, part in self.content.items()}}
        for name, part in (self.content | {"json": json.dumps(facts).encode()}).items():
            client.put_object(Bucket="bucket", Key=f"sets/large.{name}", Body=part)
        self.pieces = [
            f"{self.url}.{name} {start}"
            for name, part in self.content.items()
            for start in range(0, len(part), PIECE)
        ]

    def fetch(self, *caches: str) -> tuple[CompletedProcess[str], Requests]:
        """Return how it ended, and what each rank with a request asked for."""
        self.runs += 1
        log = self.folder / f"requests_{self.runs}"
        log.touch()
        places = [str(self.folder / name) for name in caches]
        outcome = run_forked("tests/support/fetch_dataset.py", self.url, str(log), *places, ranks=4)
        found: Requests = defaultdict(list)
        for line in log.read_text().splitlines():
            rank, _, what = line.partition(" ")
            found[rank].append(what)
        return outcome, found

    def is_at(self, cache: str) -> bool:
        """Return whether a cache has the whole dataset."""
        place = self.folder / cache / "bucket/sets"
        return all((place / f"large.{name}").read_bytes() == part for name, part in self.content.items())


@pytest.fixture
def nodes(client: Any, tmp_path: Path) -> Nodes:
    return Nodes(client, tmp_path)


@pytest.mark.slow
def test_the_first_rank_of_each_node_fetches(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed rank has on the disk is not fetched again."""
    monkeypatch.setenv("KILLED", "2")
    outcome, _ = nodes.fetch("one", "two")
    assert outcome.returncode != 0
    monkeypatch.delenv("KILLED")
    outcome, second = nodes.fetch("one", "two")
    assert outcome.returncode == 0, outcome.stderr
    assert second["2"] == nodes.pieces[2:]
    assert set(second) <= {"0", "2"}
    assert nodes.is_at("one")
    assert nodes.is_at("two")
    outcome, third = nodes.fetch("one", "two")
    places = [str(nodes.folder / name / "bucket/sets/large") for name in ("one", "one", "two", "two")]
    assert (outcome.stdout.splitlines(), third) == (places, {})


@pytest.mark.slow
def test_nodes_that_share_a_disk_fetch_once(nodes: Nodes) -> None:
    outcome, requests = nodes.fetch("one", "one")
    assert outcome.returncode == 0, outcome.stderr
    assert sorted(requests["0"] + requests["2"]) == sorted(nodes.pieces)
    assert nodes.is_at("one")


@pytest.mark.slow
def test_no_rank_begins_with_a_damaged_dataset(nodes: Nodes, client: Any) -> None:
    client.put_object(Bucket="bucket", Key="sets/large.bin", Body=bytes(200_000))
    outcome, _ = nodes.fetch("one", "two")
    assert (outcome.returncode, outcome.stdout) == (EXIT_BAD_INPUT, "")
    assert "error: s3://bucket/sets/large.bin has the sha256" in outcome.stderr
    assert not list(nodes.folder.rglob("large.*"))
