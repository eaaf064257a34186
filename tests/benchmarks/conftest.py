"""Trainings of a comparison without the seconds of their imports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import trainings
from support.forked import run_forked


@pytest.fixture
def forked_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in forked processes, one after the other; test_trainings.py has them side by side."""

    def train(command: Sequence[str], run_dir: Path, *_: object) -> None:
        result = run_forked(*command[1:])
        assert result.returncode == 0, result.stderr

    monkeypatch.setattr(trainings, "train", train)
    monkeypatch.setattr(trainings, "side_by_side", lambda work, jobs, processes: map(work, jobs))
