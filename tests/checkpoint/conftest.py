"""What the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a module trains the run that its tests copy; nothing is there at first."""
    return tmp_path_factory.mktemp("template") / "run"
