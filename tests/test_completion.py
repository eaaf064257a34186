"""Tab in bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where options are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("python tools/make_sudoku.py --s", "--seed --size --split"),
        ("python tools/make_sudoku.py --size 4 --se", "--seed"),
        ("torchrun --nproc_per_node 2 -m pipeline.train --objective.stages_m", "--objective.stages_maximum"),
        ("python tools/make_sudoku.py held", ""),
        ("python other.py --s", ""),
    ],
)
def test_options_are_offered(words: str, offered: str, cache: Path) -> None:
    """Of the project's programs; bash itself completes everything else."""
    array = words.split()
    script = f"""
        source tools/completion.bash
        COMP_WORDS=({words}); COMP_CWORD={len(array) - 1}
        _puma_complete
        echo "${{COMPREPLY[*]}}"
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(cache),
    }
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == (offered, "")
