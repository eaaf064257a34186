"""One cluster for all tests of this folder, and a checkout with a site.env of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster.submission import CODE
from support.cluster import PROGRAMS, RUN, Cluster, slurm
from support.programs import ROOT


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start the cluster."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} are missing: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("cluster")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in CODE:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, checkout / name)
    with slurm(folder / "slurm") as configuration:
        environment = os.environ | {"SLURM_CONF": str(configuration), "PYTHONPATH": str(checkout)}
        yield Cluster(checkout, environment)


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Path:
    """Return a folder with puzzles, a tokenizer and a configuration."""
    puzzles = ["tools/make_sudoku.py", "--size", "4", "--clues", "8", "--seed", "1"]
    for split, count in (("train", "400"), ("held-out", "20")):
        cluster.python(*puzzles, "--count", count, "--split", split, "--output", f"{tmp_path}/{split}.jsonl")
    corpus = f"--input {tmp_path}/train.jsonl --prompt-key prompt --answer-key answer".split()
    shape = f"--vocab-size 16 --model-type char --output {tmp_path}/tokenizer".split()
    cluster.python("tools/train_tokenizer.py", *corpus, *shape)
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    return tmp_path
