"""A start of a run reads the metadata of each dataset once: its histograms are large."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.paths import facts_path
from support.programs import Outcome

pytestmark = pytest.mark.slow


def test_a_start_reads_each_prefix_json_once(
    train: Callable[..., Outcome], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the opens of the file, whoever opens it."""
    opened: list[str] = []
    open_file = io.open

    def counting(file: Any, *args: Any, **more: Any) -> Any:
        if isinstance(file, str | os.PathLike):
            opened.append(os.fspath(file))
        return open_file(file, *args, **more)

    monkeypatch.setattr(io, "open", counting)
    monkeypatch.setattr(builtins, "open", counting)
    outcome = train(
        tmp_path / "run", "--train.steps", "2", "--schedule.warmup_steps", "1", "--evaluation.interval", "0"
    )
    assert outcome.code == 0, outcome.error
    assert opened.count(str(facts_path(data / "pairs"))) == 1
