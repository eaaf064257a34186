"""A trained model for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run on pairs, with checkpoints at steps 4 and 8."""
    from runs import command

    from pipeline import train as program

    folder = tmp_path_factory.mktemp("run")
    settings = ["--engine.kind", "plain", "--train.steps", "8", "--schedule.warmup_steps", "1"]
    assert program.main(command(data, folder, *settings)) == 0
    return folder
