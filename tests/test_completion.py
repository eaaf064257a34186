"""Tab in bash."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.programs import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where options are kept."""
    return tmp_path_factory.mktemp("cache")


def complete(words: str, folder: Path, cache: Path, activated: bool = True) -> str:
    """Return what Tab offers behind `words` in a folder."""
    script = f"""
        source {ROOT}/tools/completion.bash
        COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}
        _puma_complete
        echo "${{COMPREPLY[*]}}"
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}" if activated else os.defpath,
        "XDG_CACHE_HOME": str(cache),
    }
    result = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.stderr == ""
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("python tools/make_sudoku.py --s", "--seed --size --split"),
        ("python tools/make_sudoku.py --size 4 --se", "--seed"),
        ("torchrun --nproc_per_node 2 -m pipeline.train --objective.stages_m", "--objective.stages_maximum"),
        ("python -m benchmarks.pilot --see", "--seeds"),
        ("python tools/make_sudoku.py held", ""),
        ("python other.py --s", ""),
    ],
)
def test_options_are_offered(words: str, offered: str, cache: Path) -> None:
    """Of the project's programs; bash itself completes everything else."""
    assert complete(words, ROOT, cache) == offered


def test_an_environment_need_not_be_active(cache: Path) -> None:
    """The interpreter that is written out answers for its programs."""
    words = f"{sys.executable} tools/merge_datasets.py --out"
    assert complete(words, ROOT, cache, activated=False) == "--output-prefix"


def test_options_follow_the_modules_that_give_them(tmp_path: Path, cache: Path) -> None:
    """Most options of a tool come from modules of the package, which change without the tool."""
    tool, module = tmp_path / "tools/one.py", tmp_path / "pipeline/options.py"
    for path in (tool, module):
        path.parent.mkdir()
    tool.write_text("import pathlib\nprint(pathlib.Path('pipeline/options.py').read_text())\n")
    for option, seconds in (("--first", 0), ("--second", 60)):
        module.write_text(option)
        os.utime(module, (time.time() + seconds,) * 2)
        assert complete("python tools/one.py --", tmp_path, cache) == option
