"""The log of skipped steps survives a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.ranks import Ranks
from pipeline.resilience import skipped
from pipeline.resilience.skipped import SkipLog


def open_log(run_dir: Path) -> SkipLog:
    """Return the log of a run on one rank."""
    return SkipLog(run_dir, Ranks())


def test_a_full_disk_takes_the_steps_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk must not end the run; the entries are written later, and a resumed run reads them."""

    def full(path: Path, content: bytes) -> Any:
        raise OSError(28, "No space left on device", str(path))

    log = open_log(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(skipped, "append", full)
        log.skip(5, "the loss is not finite", [3, 1])
        log.roll_back(5, to=4, in_a_row=1)
    assert "skipped.jsonl: No space left on device" in capsys.readouterr().out
    assert (log.skipped(), log.excluded(), log.rollbacks_to(4)) == (1, {1, 3}, 1)
    log.sync()
    log.skip(7, "the loss is not finite", [2])
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 5, 7]
    assert open_log(tmp_path).entries == log.entries
