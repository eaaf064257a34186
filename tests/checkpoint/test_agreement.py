"""What fails on one rank, a save or a start, fails on all without a deadlock; two threads play the ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from pipeline import config as configuration
from pipeline.base.errors import Failure, UserError
from pipeline.checkpoint import saving
from pipeline.checkpoint.manifest import FORMAT, Manifest, checkpoints
from pipeline.checkpoint.saving import Saver
from pipeline.ranks import Ranks
from pipeline.training.start import start
from support.runs import command

pytestmark = pytest.mark.slow

RANKS = 2
T = TypeVar("T")


class Memory:
    """Shared memory through which the threads exchange values."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=60)
        self.values: list[Any] = [None] * RANKS


@dataclass(frozen=True)
class Thread(Ranks):
    """A thread that plays a rank."""

    memory: Memory = field(default_factory=Memory)

    def all_gather(self, value: T) -> list[T]:
        """Exchange in memory."""
        self.memory.values[self.rank] = value
        self.memory.barrier.wait()
        found = list(self.memory.values)
        self.memory.barrier.wait()
        return found


def engine_of(rank: int, memory: Memory) -> Any:
    """Return an engine with one tensor to save."""

    def snapshot(folder: Path) -> dict[str, Any]:
        return {f"part_{rank}.pt": torch.arange(4)}

    return SimpleNamespace(ranks=Thread(rank, RANKS, memory=memory), snapshot=snapshot)


@pytest.fixture
def savers(tmp_path: Path) -> tuple[list[Saver], list[str]]:
    """Return one saver per rank, and the list of their messages."""
    arguments = ["--run_dir", str(tmp_path), "--data.prefixes", "[unused]", "--data.tokenizer", "unused"]
    config = configuration.load([*arguments, "--checkpoint.max_failed_saves", "2"])
    memory, said = Memory(), list[str]()
    groups = [
        [SimpleNamespace(state_dict=lambda rank=rank: {"slots": np.array([rank])})] for rank in range(RANKS)
    ]
    return [Saver(config, engine_of(r, memory), groups[r], [], said.append) for r in range(RANKS)], said  # type: ignore[arg-type]


def save(savers: list[Saver], step: int) -> list[BaseException | None]:
    """Save on all ranks at once and wait; return the exception of each rank."""
    manifest = Manifest(FORMAT, step, 0, RANKS, "zero3", RANKS, {"rows": 1, "tokens": 1, "mask_id": 0}, "")

    def one(saver: Saver) -> None:
        saver.save(manifest)
        saver.wait()

    with ThreadPoolExecutor(RANKS) as pool:
        return [work.exception(timeout=120) for work in [pool.submit(one, saver) for saver in savers]]


def fail_on(monkeypatch: pytest.MonkeyPatch, name: str, part: str, where: Any = saving) -> None:
    """Make a function of the saving module, or of `where`, fail for paths that contain `part`."""
    original: Callable[..., object] = getattr(where, name)

    def failing(path: Path, *rest: object, **options: object) -> object:
        if part in path.name:
            raise OSError(28, "No space left on device", str(path))
        return original(path, *rest, **options)

    monkeypatch.setattr(where, name, failing)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("also", ["", "report", "removal"])
def test_one_ranks_failure_is_everybodys(
    savers: tuple[list[Saver], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    also: str,
) -> None:
    """A file cannot be written; in some cases its report cannot be written or the file not removed either."""
    both, said = savers
    assert save(both, 1) == [None, None]
    with monkeypatch.context() as patch:
        fail_on(patch, "write_hashed", f"part_{rank}")
        if also == "report":
            fail_on(patch, "write_json", f"report_{rank:05d}")
        if also == "removal":
            fail_on(patch, "unlink", f"part_{rank}", Path)
        assert save(both, 2) == [None, None]
        assert [saver.failures for saver in both] == [1, 1]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
        failures = [line for line in said if "saving step 2 FAILED" in line]
        assert len(failures) == 1
        assert f"part_{rank}.pt: No space left on device" in failures[0]
        assert all(isinstance(error, Failure) for error in save(both, 3)), "two in a row, on both ranks"
    assert save(both, 4) == [None, None]
    assert [saver.failures for saver in both] == [0, 0]
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == "step_00000004"
    assert {path.name for path in (newest / "model").iterdir()} == {"part_0.pt", "part_1.pt"}


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("setting", ["tokenizer", "prefixes"])
def test_what_one_rank_cannot_read_no_rank_starts_with(
    data: Path, tmp_path: Path, bad_rank: int, setting: str
) -> None:
    """As on a node without the file: the other ranks would print the stack of a broken connection."""
    memory = Memory()
    gone = {"tokenizer": "gone", "prefixes": "[gone]"}[setting]

    def one(rank: int) -> str:
        more = [f"--data.{setting}", gone] if rank == bad_rank else []
        config = configuration.load(command(data, tmp_path / "run", *more))
        signals: Any = SimpleNamespace(received=False)
        with ExitStack() as stack, pytest.raises(UserError) as found:
            start(config, Thread(rank, RANKS, memory=memory), signals, stack)
        return str(found.value)

    with ThreadPoolExecutor(RANKS) as pool:
        first, second = pool.map(one, range(RANKS))
    assert first == second
    assert "gone" in first
    assert not (tmp_path / "run/checkpoints").exists()
