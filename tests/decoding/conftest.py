"""A short run shared by all decoding tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import train
from support.runs import command


@pytest.fixture(scope="session")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 4 steps on pairs of up to 12 tokens."""
    folder = tmp_path_factory.mktemp("run")
    short = ("--train.steps", "4", "--schedule.warmup_steps", "1", "--engine.kind", "plain")
    assert not train.main(command(data, folder, *short))
    return folder
