"""One run that all tests of what a run records look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.runs import command

MORE = ["--objective.threshold", "0.3", "--optimizer.ema_decay", "0.9", "--train.log_samples", "true"]


@pytest.fixture(scope="session")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 16 steps that lost all it did after step 12, and went on."""
    from pipeline import train

    folder = tmp_path_factory.mktemp("recorded")
    arguments = command(data, folder / "run", "--engine.kind", "plain", *MORE)
    assert train.main(arguments) == 0
    (folder / "run/checkpoints/step_00000016").rename(folder / "lost")
    assert train.main(arguments) == 0
    return folder / "run"
