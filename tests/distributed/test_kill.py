"""SIGKILL at random moments: the program that does it for an hour does it here three times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.forked import run_forked

pytestmark = pytest.mark.distributed


@pytest.mark.timeout(1500)
def test_a_killed_run_repeats_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    """Two ranks, accumulation, threshold, growing K, moving average; in a step, a save, an evaluation."""
    output = tmp_path / "result.json"
    options = ["--kills", "3", "--steps", "36", "--folder", str(tmp_path), "--output", str(output)]
    result = run_forked("-m", "benchmarks.kill_resume", *options, timeout=1400)
    assert result.returncode == 0, result.stderr
    facts = json.loads(output.read_text())
    assert [death["aim"] for death in facts["deaths"]] == ["training", "save", "evaluation"]
    assert facts["differing"] == facts["steps_with_other_examples"] == 0
    assert facts["values"] > 36 * 5
    lines = [json.loads(line) for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 37)), "each step once"
    alone = [json.loads(line) for line in (tmp_path / "alone/metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "held_out/ema_loss"):
        assert [line[key] for line in lines if key in line] == [line[key] for line in alone if key in line]
