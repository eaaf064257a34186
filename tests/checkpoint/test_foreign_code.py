"""A prepared checkpoint runs nothing: every program refuses it by one line, whatever engine wrote it."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.base.errors import EXIT_BAD_INPUT, UserError
from pipeline.engine.tensor_files import read_tensors
from support.checkpoints import rehash
from support.forked import run_forked
from support.pickles import Command
from support.programs import Outcome, run_here
from support.runs import command
from tools import evaluate, export_hf, generate

Train = Callable[..., Outcome]
PLAIN = "plain.pt"
SHARDS = ("model/mp_rank_00_model_states.pt", "model/zero_pp_rank_0_mp_rank_00_optim_states.pt")
SETTINGS = ["--train.steps", "4", "--optimizer.ema_decay", "0.9", "--evaluation.interval", "0"]


def prepare(path: Path, made: Path) -> None:
    """Add a command to a file of a checkpoint that is honest apart from it, and to its manifest's hashes."""
    content: dict[str, Any] = torch.load(path, weights_only=False)
    torch.save(content | {"more": Command(made)}, path)
    folder = next(each for each in path.parents if (each / "manifest.json").exists())
    rehash(folder, str(path.relative_to(folder)))


def write_zip(path: Path, made: Path) -> None:
    torch.save({"model": Command(made)}, path)


def write_zip_of_newer_pickles(path: Path, made: Path) -> None:
    torch.save({"model": Command(made)}, path, pickle_protocol=4)


def write_old_format(path: Path, made: Path) -> None:
    torch.save({"model": Command(made)}, path, _use_new_zipfile_serialization=False)


def write_bare_pickle(path: Path, made: Path) -> None:
    path.write_bytes(pickle.dumps(Command(made)))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    "write", [write_zip, write_zip_of_newer_pickles, write_old_format, write_bare_pickle]
)
def test_no_form_of_a_pickle_is_run(
    tmp_path: Path, write: Callable[[Path, Path], None], mmap: bool, recwarn: pytest.WarningsRecorder
) -> None:
    path, made = tmp_path / "x.pt", tmp_path / "made"
    write(path, made)
    with pytest.raises(UserError, match=r"x\.pt (names (posix|nt)\.mkdir|is not a file|is damaged)"):
        read_tensors(path, mmap=mmap)
    assert not made.exists()


def test_a_file_of_something_else_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for content in ([1], {"other": 1}, 3):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"x\.pt does not hold model, optimizer"):
            read_tensors(path, ("model", "optimizer"))
    buffer = io.BytesIO()
    torch.save({"model": torch.zeros(99)}, buffer)
    for size in (0, 5, len(buffer.getvalue()) // 2):
        path.write_bytes(buffer.getvalue()[:size])
        with pytest.raises(UserError, match=r"x\.pt is damaged"):
            read_tensors(path)


def check_tools(run: Path, made: Path, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Generate, evaluate and export: each refuses by one line that names the file and what it holds."""
    items = run.parent / "items.jsonl"
    items.write_text('{"prompt": "a", "answer": "b"}\n')
    checkpoint, output = ["--checkpoint", str(run), "--weights", "raw"], str(run.parent / "exported")
    programs: list[tuple[Callable[..., None], list[str]]] = [
        (generate.main, ["--prompt", "a"]),
        (evaluate.main, ["--task", "exact", "--data", str(items)]),
        (export_hf.main, ["--output", output]),
    ]
    for main, more in programs:
        line = run_here(main, [*checkpoint, *more], capsys).complaint()
        assert named in line
        assert "posix.mkdir" in line
        assert not made.exists()


@pytest.mark.slow
def test_a_checkpoint_of_the_plain_engine(
    data: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, made = tmp_path / "run", tmp_path / "made"
    assert train(run, *SETTINGS).code == 0
    prepare(run / "checkpoints/step_00000004/model" / PLAIN, made)
    check_tools(run, made, PLAIN, capsys)
    line = train(run, *SETTINGS, "--train.steps", "8").complaint()
    assert PLAIN in line
    assert "posix.mkdir" in line
    assert not made.exists()


@pytest.fixture(scope="module")
def sharded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one rank by ZeRO-1."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert resume(data, folder, 1, "4").returncode == 0
    return folder


def resume(data: Path, folder: Path, ranks: int, steps: str) -> Any:
    """Train the run in `folder`, or resume it."""
    more = [*SETTINGS, "--train.steps", steps, "--engine.precision", "fp32"]
    more += ["--engine.deepspeed_config", str(folder / "zero.json")]
    return run_forked("-m", "pipeline.train", *command(data, folder / "run", *more), ranks=ranks)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SHARDS)
def test_a_sharded_checkpoint(
    data: Path, sharded: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed itself would run the command: at its resume, its conversion, and its reading of weights."""
    folder, made = tmp_path / "copy", tmp_path / "made"
    shutil.copytree(sharded, folder)
    prepare(folder / "run/checkpoints/step_00000004/model" / name, made)
    check_tools(folder / "run", made, Path(name).name, capsys)
    for ranks in (1, 2):
        result = resume(data, folder, ranks, "8")
        # Both ranks say it: each has a file of its own.
        lines = list({line for line in result.stderr.splitlines() if "error:" in line})
        assert len(lines) == 1, result.stderr
        assert Path(name).name in lines[0]
        assert "posix.mkdir" in lines[0]
        assert result.returncode == EXIT_BAD_INPUT
        assert not made.exists()


@pytest.mark.distributed
def test_deepspeed_itself_runs_nothing(data: Path, sharded: Path, tmp_path: Path) -> None:
    """Also where a file is exchanged after it was checked."""
    from pipeline.engine.deepspeed import checkpointing
    from pipeline.ranks import Ranks

    folder, made = tmp_path / "copy", tmp_path / "made"
    shutil.copytree(sharded, folder)
    model = folder / "run/checkpoints/step_00000004/model"
    prepare(model / SHARDS[1], made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "check_files", lambda *_: None)
        with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir"):
            checkpointing.open_sharded_weights(model)
    with pytest.raises(UserError, match="cannot be converted"):
        checkpointing.make_universal(model, tmp_path, Ranks())
    assert not made.exists()
