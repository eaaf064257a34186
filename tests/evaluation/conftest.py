"""A trained model and sandboxes, shared by the evaluation tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.evaluation.sandbox import Limits, Sandbox
from support.sandboxes import started


@pytest.fixture(scope="session")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run on pairs, with checkpoints at steps 4 and 8.

    The weights are large. Near the uniform distribution confidences tie except for rounding, and another
    batch size or another machine would rank them differently.
    """
    from pipeline import train as program
    from support.runs import command

    folder = tmp_path_factory.mktemp("run")
    settings = ["--engine.kind", "plain", "--train.steps", "8", "--schedule.warmup_steps", "1"]
    settings += ["--model.init_std", "0.5"]
    assert program.main(command(data, folder, *settings)) == 0
    return folder


@pytest.fixture(scope="module", params=["this", "further"])
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Return a sandbox with all layers of this kernel, then one with only the required layers."""
    with started(request.param, Limits(cpu_seconds=2, wall_seconds=8)) as one:
        yield one
