"""Files whose hashes are right, but whose content is not that of the run: one line names each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.base.errors import UserError
from pipeline.engine.protocol import FileLayout
from support.checkpoints import rehash
from support.pickles import Command
from support.programs import Outcome, run_here
from tools import generate

Train = Callable[..., Outcome]
SETTINGS = ["--optimizer.ema_decay", "0.9", "--evaluation.interval", "0", "--train.steps"]
FOLDER = "checkpoints/step_00000004"


@pytest.fixture
def run_dir(template: Path, train: Train, tmp_path: Path) -> Path:
    """Return a copy of a run with a moving average."""
    if not template.exists():
        assert train(template, *SETTINGS, "4").code == 0
    return Path(shutil.copytree(template, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model/plain.pt", "model/ema_00000.pt"])
@pytest.mark.parametrize("value", [{}, 3])
def test_states_of_something_else(run_dir: Path, train: Train, name: str, value: Any) -> None:
    path = run_dir / FOLDER / name
    torch.save(dict.fromkeys(torch.load(path, weights_only=True), value), path)
    rehash(run_dir / FOLDER, name)
    line = train(run_dir, *SETTINGS, "8").complaint()
    assert str(path.parent) in line
    assert "older checkpoint" in line


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [True, False])
def test_slots_of_something_else(run_dir: Path, train: Train, tmp_path: Path, pickled: bool) -> None:
    """Numpy would advise to run the pickle."""
    path = run_dir / FOLDER / "slots_00000.npz"
    if pickled:
        command = np.array([Command(tmp_path / "made")], dtype=object)
        with path.open("wb") as file:
            np.savez(file, slots=command)
    else:
        path.write_bytes(b"")
    rehash(run_dir / FOLDER, path.name)
    line = train(run_dir, *SETTINGS, "8").complaint()
    assert f"the slots in {run_dir / FOLDER} cannot be read" in line
    assert "allow_pickle" not in line
    assert ("could run commands" in line) == pickled
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_a_vocabulary_of_another_size(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of it would not fit into any memory."""
    vocabulary = {"rows": 10**12, "tokens": 10**12, "mask_id": 3}
    rehash(run_dir / FOLDER, vocabulary=vocabulary)
    for weights in ("raw", "ema"):
        options = ["--checkpoint", str(run_dir), "--weights", weights, "--prompt", "a"]
        line = run_here(generate.main, options, capsys).complaint()
        assert "manifest.json: vocabulary.rows is 1000000000000, but the weights have 16" in line


@pytest.mark.distributed
def test_the_file_of_a_rank_is_missing(tmp_path: Path) -> None:
    """DeepSpeed counts some of them, by an assertion on one rank."""
    from pipeline.engine.deepspeed.checkpointing import check_complete

    folder = tmp_path / "model"
    folder.mkdir()
    for rank in range(2):
        for kind in ("model", "optim"):
            (folder / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt").touch()
    check_complete(tmp_path, FileLayout("zero3", 2))
    for kind in ("model", "optim"):
        path = folder / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt"
        path.unlink()
        with pytest.raises(UserError, match=rf"holds 1 files \*_{kind}_states\.pt, but 2 ranks wrote 2"):
            check_complete(tmp_path, FileLayout("zero3", 2))
        path.touch()
