"""Asynchronous saves, failed saves, and retention."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.base import errors
from pipeline.checkpoint import saving
from pipeline.checkpoint.manifest import Manifest
from pipeline.checkpoint.retention import discard, kept
from pipeline.config import CheckpointConfig
from pipeline.engine.snapshot import HostCopy
from pipeline.training import preflight
from support.programs import Outcome
from support.runs import curve

pytestmark = pytest.mark.slow

Train = Callable[..., Outcome]
SHORT = ["--evaluation.interval", "0"]


def steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def test_blocking_and_asynchronous_saves_are_the_same(train: Train, tmp_path: Path) -> None:
    """Every file is equal byte by byte: training during a save does not change the saved state."""
    for name, asynchronous in (("behind", "true"), ("blocking", "false")):
        assert train(tmp_path / name, *SHORT, "--checkpoint.asynchronous", asynchronous).code == 0
    for step in (4, 8, 12, 16):
        name = f"checkpoints/step_{step:08d}/model/plain.pt"
        assert (tmp_path / "behind" / name).read_bytes() == (tmp_path / "blocking" / name).read_bytes()


def test_training_continues_while_a_save_is_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk blocks until the next save begins; that save waits for the first one."""
    written = saving.write_hashed
    events: list[str] = []
    go_on = threading.Event()

    def slow(path: Path, write: Callable[..., object]) -> object:
        if path.name == "plain.pt":
            assert go_on.wait(60)
            events.append("written")
        return written(path, write)

    class Watched(saving.Saver):
        def save(self, manifest: Manifest) -> None:
            events.append(f"save {manifest.step}")
            if manifest.step == 12:
                go_on.set()
            super().save(manifest)
            events.append(f"saved {manifest.step}")

    monkeypatch.setattr(saving, "write_hashed", slow)
    monkeypatch.setattr("pipeline.training.start.Saver", Watched)
    assert train(tmp_path / "run", *SHORT, "--checkpoint.interval", "6", "--train.steps", "12").code == 0
    assert events == ["save 6", "saved 6", "save 12", "written", "saved 12", "written"]
    assert steps(tmp_path / "run") == [6, 12]


def test_copies_stay_as_they_were_and_share_what_was_shared() -> None:
    copy, weight = HostCopy(), torch.arange(6.0)
    state = {"a": weight, "b": weight.view(6), "c": [weight[:2], (1, "x")], "d": torch.empty(0)}
    first = copy("file", state)
    weight += 1
    assert first["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert first["a"] is first["b"]
    assert first["c"] == [first["c"][0], (1, "x")]
    assert first["c"][0].tolist() == [0, 1]
    again = copy("file", state)
    assert again["a"] is first["a"], "the same memory, not more of it"
    assert again["a"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_failed_save_is_reported_and_training_continues(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures that are not consecutive do not stop a run, leave no files and change no loss."""
    assert train(tmp_path / "sound", *SHORT).code == 0
    written = saving.write_hashed

    def failing(path: Path, write: Callable[..., object]) -> object:
        if path.parent.parent.name in (".writing_00000004", ".writing_00000012") and path.name == "plain.pt":
            raise OSError(28, "No space left on device", str(path))
        return written(path, write)

    monkeypatch.setattr(saving, "write_hashed", failing)
    outcome = train(tmp_path / "run", *SHORT, "--checkpoint.max_failed_saves", "2")
    assert outcome.code == 0
    for step in (4, 12):
        lines = [line for line in outcome.output.splitlines() if f"saving step {step} FAILED" in line]
        assert len(lines) == 1
        assert "plain.pt: No space left on device" in lines[0]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "step_00000008",
        "step_00000016",
    ]
    assert curve(tmp_path / "run", "loss") == curve(tmp_path / "sound", "loss")


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the save at `step` fail."""
    written = saving.write_hashed

    def failing(path: Path, write: Callable[..., object]) -> object:
        if f".writing_{step:08d}" in path.parts:
            raise OSError(28, "No space left on device", str(path))
        return written(path, write)

    monkeypatch.setattr(saving, "write_hashed", failing)


def test_a_run_whose_last_step_is_not_saved_is_not_done(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that depend on the run must not start; the same command repeats the lost steps."""
    with monkeypatch.context() as patch:
        fail_at(patch, 16)
        outcome = train(tmp_path, *SHORT)
    assert outcome.code == errors.EXIT_FAILED
    assert "done" not in outcome.output
    assert "the last step, 16, is trained but not saved" in outcome.error
    assert "No space left on device" in outcome.error
    assert steps(tmp_path) == [4, 8, 12]
    assert "No space left" in (tmp_path / "history.jsonl").read_text().splitlines()[-1]
    again = train(tmp_path, *SHORT)
    assert again.code == errors.EXIT_DONE
    assert "(step 12)" in again.output


def test_too_many_failed_saves_stop_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run exits with EXIT_FAILED, and the good checkpoint is kept."""
    assert train(tmp_path / "run", *SHORT, "--train.steps", "4").code == 0

    def failing(path: Path, write: Callable[..., object]) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(saving, "write_hashed", failing)
    outcome = train(tmp_path / "run", *SHORT, "--checkpoint.max_failed_saves", "2")
    assert outcome.code == errors.EXIT_FAILED
    assert outcome.error.count("\n") == 1
    assert "2 saves in a row have failed" in outcome.error
    assert "Permission denied" in outcome.error
    assert steps(tmp_path / "run") == [4]


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a file system of 1 MB, without the disk check before the start."""
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["before", "while-writing"])
def test_full_disk(
    train: Train, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Free space is checked before writing; if it still runs out, no files are left."""
    run_dir = small_disk / "run"
    if not checked:
        lots = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: lots)
    more = ["--data.cache", str(tmp_path / "cache"), "--model.hidden_size", "128", "--train.steps", "8"]
    outcome = train(run_dir, *SHORT, *more, "--checkpoint.max_failed_saves", "2")
    assert outcome.code == errors.EXIT_FAILED
    wanted = "MB free: make room" if checked else "No space left on device"
    assert outcome.output.count("FAILED") == 2
    assert outcome.output.count(wanted) == 2
    assert wanted in outcome.error
    assert list((run_dir / "checkpoints").iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_disk_that_is_full_for_a_while(
    train: Train, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from step 4 to step 12: the run loses two checkpoints and metrics, but continues."""
    run_dir, filling = small_disk / "run", small_disk / "filling"

    class Watched(saving.Saver):
        def save(self, manifest: Manifest) -> None:
            super().save(manifest)
            self.wait()
            if manifest.step == 4:
                with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * 512)
            if manifest.step == 12:
                filling.unlink()

    monkeypatch.setattr("pipeline.training.start.Saver", Watched)
    more = ["--data.cache", str(tmp_path / "cache"), "--checkpoint.keep", "1", "--train.steps", "20"]
    outcome = train(run_dir, *SHORT, *more)
    assert outcome.code == 0, outcome.error
    assert outcome.output.count("FAILED") == 2
    assert outcome.output.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert steps(run_dir) == [20]
    written = {step for step, _ in curve(run_dir, "loss")}  # fails on a partial line
    assert written >= {1, 2, 3, 4, *range(13, 21)}
    assert 12 not in written
    shown = EventAccumulator(str(run_dir / "tensorboard")).Reload().Scalars("train/loss")
    assert {point.step for point in shown} >= {1, 2, 3, 4, 17, 18, 19, 20}


def test_read_only_folder(train: Train, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    complaint = train(small_disk).complaint()
    assert str(small_disk / "run.lock") in complaint
    assert "Read-only file system" in complaint


def test_which_checkpoints_stay() -> None:
    """The newest, every m-th and the best, against a hand-made table."""

    def manifest(step: int, loss: float | None) -> Manifest:
        return Manifest(
            2, step, 0, 1, "none", 1, {"rows": 1, "tokens": 1, "mask_id": 0}, "", held_out_loss=loss
        )

    losses = {10: math.nan, 20: 1.0, 30: None, 40: 2.0, 50: 1.5, 60: None, 70: 2.5}
    manifests = [manifest(step, loss) for step, loss in losses.items()]
    for settings, stay in [
        ({"keep": 1}, {70}),
        ({"keep": 3}, {50, 60, 70}),
        ({"keep": 9}, set(losses)),
        ({"keep": 1, "keep_every": 30}, {30, 60, 70}),
        ({"keep": 1, "keep_best": 2}, {20, 50, 70}),
        ({"keep": 2, "keep_every": 40, "keep_best": 1}, {20, 40, 60, 70}),
    ]:
        assert kept(manifests, CheckpointConfig(**settings)) == stay, settings


def test_retention_in_a_run(train: Train, tmp_path: Path) -> None:
    """keep_every and keep_best keep checkpoints that keep alone would remove."""
    more = ["--checkpoint.keep", "1", "--checkpoint.keep_every", "8", "--checkpoint.keep_best", "1"]
    assert train(tmp_path / "run", "--evaluation.interval", "4", "--train.steps", "20", *more).code == 0
    losses = dict(curve(tmp_path / "run", "held_out/loss"))
    best = min(losses, key=lambda step: losses[step])
    assert steps(tmp_path / "run") == sorted({8, 16, 20, best})


def test_checkpoints_of_an_abandoned_future_are_not_counted(train: Train, tmp_path: Path) -> None:
    """After resuming from an older checkpoint, `keep` counts new checkpoints, not broken newer ones."""
    run_dir = tmp_path / "run"
    assert train(run_dir, *SHORT, "--checkpoint.keep", "2").code == 0
    os.truncate(run_dir / "checkpoints/step_00000016/model/plain.pt", 10)
    more = ["--checkpoint.interval", "1", "--train.steps", "14", "--checkpoint.keep", "1"]
    assert train(run_dir, *SHORT, *more).code == 0
    assert steps(run_dir) == [14, 16]
    assert "(step 14)" in train(run_dir, *SHORT).output


def test_checkpoints_that_are_out_of_reach(train: Train, tmp_path: Path) -> None:
    """As on a file system that is not mounted: the run would begin anew, over its curves."""
    run_dir = tmp_path / "run"
    assert train(run_dir, *SHORT, "--train.steps", "4").code == 0
    curves = (run_dir / "metrics.jsonl").read_bytes()
    folder = run_dir / "checkpoints"
    folder.rename(tmp_path / "kept")
    folder.symlink_to(tmp_path / "gone")
    line = train(run_dir, *SHORT, "--train.steps", "8").complaint()
    assert f"{folder} cannot be written (a link to {tmp_path / 'gone'}, which does not exist)" in line
    folder.unlink()
    folder.write_text("")
    assert f"{folder} cannot be written (File exists)" in train(run_dir, *SHORT).complaint()
    assert (run_dir / "metrics.jsonl").read_bytes() == curves
    folder.unlink()
    folder.symlink_to(tmp_path / "kept")
    assert "(step 4)" in train(run_dir, *SHORT, "--train.steps", "8").output
    assert steps(run_dir) == [4, 8]


def test_of_a_link_the_link_alone_is_removed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for _ in range(2):
        (tmp_path / "step_00000004").symlink_to(tmp_path / "elsewhere")
        discard(tmp_path / "step_00000004")
        assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_checkpoint_that_cannot_be_removed_fails_no_save(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(16, "Device or resource busy", str(folder))

    monkeypatch.setattr("pipeline.checkpoint.retention.discard", refuse)
    outcome = train(tmp_path / "run", *SHORT, "--checkpoint.keep", "1")
    assert outcome.code == 0
    assert "could not be removed" in outcome.output
    assert steps(tmp_path / "run") == [4, 8, 12, 16]
