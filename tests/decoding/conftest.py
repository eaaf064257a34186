"""A short run shared by all decoding tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import train
from support.runs import command


@pytest.fixture(scope="session")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on pairs of up to 12 tokens, 4 steps long.

    The weights are large, so that no two confidences lie within the rounding of another batch or machine.
    """
    folder = tmp_path_factory.mktemp("run")
    short = ("--train.steps", "4", "--schedule.warmup_steps", "1", "--engine.kind", "plain")
    short += ("--model.init_std", "0.5")
    assert not train.main(command(data, folder, *short))
    return folder
