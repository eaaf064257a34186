"""How a checkpoint comes to exist: copied in memory, written behind the training, then all at once.

Every rank copies its state to host memory, and a thread writes the copy while training goes on. The files lie
in a folder of another name. Each rank leaves a report there with the hashes of its files; when all have come,
the first rank writes the manifest and renames the folder. No thread runs a collective.
"""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from pipeline import config as configuration
from pipeline.base.errors import Failure
from pipeline.base.files import FileFacts, replacing, sha256_of, sync_folder, sync_tree, write_hashed
from pipeline.chains.slots import SlotGroup
from pipeline.checkpoint.manifest import MANIFEST, Manifest
from pipeline.checkpoint.retention import discard, prune
from pipeline.config import Config
from pipeline.engine.protocol import Engine
from pipeline.engine.snapshot import state_bytes

_POLL = 0.05  # seconds between two looks for the other ranks' reports
_LAST_MOMENTS = 60.0  # seconds that a failing run gives a checkpoint that is being written


@dataclass
class _Work:
    """A checkpoint that is being written.

    Attributes:
        folder: where its files are until it is whole.
        manifest: its facts, still without files.
        files: what this rank writes, by path in the folder.
        problem: what went wrong, here or, on the first rank, anywhere.
        shown: whether the user has been told.
        written: set when this rank has written its files, or failed.
        given_up: set when the first rank need not wait for more reports.
        thread: what writes.
    """

    folder: Path
    manifest: Manifest
    files: dict[str, Callable[[BinaryIO], object]]
    problem: str | None = None
    shown: bool = False
    written: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Attributes:
        problem: why the last save failed, as of `wait`; None when it did not.
    """

    def __init__(
        self, config: Config, engine: Engine, groups: Sequence[SlotGroup], say: Callable[[str], None]
    ) -> None:
        """Prepare.

        Args:
            config: the run.
            engine: whose weights and optimizer state are saved.
            groups: the chains of this rank.
            say: how the user is told; called from a thread.
        """
        self.config = config
        self.engine = engine
        self.groups = groups
        self.say = say
        self.first = engine.ranks.is_first
        self.folder = Path(config.run_dir) / "checkpoints"
        self.failures = 0
        self.problem: str | None = None
        self.work: _Work | None = None
        # Read now: who moves the tokenizer while a run lasts must not lose its checkpoints.
        self.common = _common_files(config) if self.first else {}

    def save(self, manifest: Manifest) -> None:
        """Save the state as it is now; every rank calls this between two steps.

        Returns when the state is copied, or, unless ``checkpoint.asynchronous``, when it is on the disk. A
        save that fails is reported, leaves nothing behind and harms no other checkpoint.

        Raises:
            Failure: when ``checkpoint.max_failed_saves`` in a row have failed.
        """
        self.wait()
        work = _Work(self.folder / f".writing_{manifest.step:08d}", replace(manifest), dict(self.common))
        problem = self.engine.ranks.first_problem(self._make_folder(work.folder) if self.first else None)
        if problem is None:
            states = self.engine.snapshot(work.folder / "model")
            slots = merge_states([group.state_dict() for group in self.groups])
            size = sum(state_bytes(state) for state in states.values())
            work.files |= {f"model/{name}": partial(torch.save, state) for name, state in states.items()}
            packed = io.BytesIO()  # numpy writes to files that can be read, too
            np.savez(packed, allow_pickle=False, **slots)
            work.files[f"slots_{self.engine.ranks.rank:05d}.npz"] = _bytes_writer(packed.getvalue())
            problem = self._lack_of_space(size + len(packed.getvalue()))
        if problem is not None:
            self._failed(work, problem)
            return
        self.work = work
        work.thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        work.thread.start()
        if not self.config.checkpoint.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is whole or has failed; every rank calls this, also at the end of a run.

        Raises:
            Failure: when ``checkpoint.max_failed_saves`` in a row have failed.
        """
        work, self.work = self.work, None
        if work is None or work.thread is None:
            return
        work.written.wait()
        problem = self.engine.ranks.first_problem(work.problem)
        if problem is not None:
            work.given_up.set()  # a rank that could not even leave a report
        work.thread.join()
        problem = self.engine.ranks.first_problem(problem or work.problem)
        if problem is None:
            self.failures, self.problem = 0, None
        else:
            self._failed(work, problem)

    def writing(self) -> bool:
        """Say whether this rank is still writing the last save."""
        return self.work is not None and self.work.thread is not None and self.work.thread.is_alive()

    def close(self) -> None:
        """Give a checkpoint that is being written the time to become whole; no rank waits for another.

        After `wait` there is nothing left to do: this is for a run that ends by an error.
        """
        if self.work is not None and self.work.thread is not None:
            self.work.thread.join(_LAST_MOMENTS)

    def _failed(self, work: _Work, problem: str) -> None:
        """Count a failed save, on all ranks alike."""
        self.failures, self.problem = self.failures + 1, problem
        limit = self.config.checkpoint.max_failed_saves
        if self.first:
            shutil.rmtree(work.folder, ignore_errors=True)
            self._report_failure(work, problem)
        if self.failures >= limit:
            raise Failure(
                f"{self.failures} saves in a row have failed (checkpoint.max_failed_saves), the last one: "
                f"{problem} Older checkpoints are unharmed: put it right, and start the same command again."
            )

    def _report_failure(self, work: _Work, problem: str) -> None:
        if not work.shown:
            self.say(f"saving step {work.manifest.step} FAILED: {problem} The run goes on.")
        work.shown = True

    def _make_folder(self, folder: Path) -> str | None:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "model").mkdir(parents=True)
        except OSError as error:
            return _describe(error)
        return None

    def _lack_of_space(self, size: int) -> str | None:
        """Return what is missing for the `size` bytes of this rank and those of the others, if anything."""
        facts = self.engine.ranks.all_gather((size, shutil.disk_usage(self.folder).free if self.first else 0))
        need, free = sum(size for size, _ in facts), facts[0][1]
        if need <= free:
            return None
        return (
            f"a checkpoint needs {need / 1e6:,.1f} MB, and {self.folder} has {free / 1e6:,.1f} MB free: make "
            "room, or lower checkpoint.keep."
        )

    def _run(self, work: _Work) -> None:
        """Write this rank's files, and on the first rank make the whole a checkpoint; runs in a thread."""
        report = work.folder / _report_name(self.engine.ranks.rank)
        try:
            files = {name: asdict(write_hashed(work.folder / name, w)) for name, w in work.files.items()}
            _write_json(report, {"files": files})
        except Exception as error:
            work.problem = _describe(error)
            try:
                for name in work.files:  # what is left would keep a full disk full
                    (work.folder / name).unlink(missing_ok=True)
                _write_json(report, {"problem": work.problem})
            except OSError:  # the whole file system may have failed
                work.given_up.set()
        work.written.set()
        if not self.first:
            return
        try:
            self._commit(work)
        except Exception as error:
            work.problem = _describe(error)
            self._report_failure(work, work.problem)

    def _commit(self, work: _Work) -> None:
        """Make the folder a checkpoint once all ranks have written their part."""
        files: dict[str, FileFacts] = {}
        for rank in range(self.engine.ranks.world_size):
            path = work.folder / _report_name(rank)
            while not path.exists():
                if work.given_up.wait(_POLL):
                    return  # `wait` knows why
            report = json.loads(path.read_bytes())
            if "problem" in report:
                raise _Reported(report["problem"])
            files |= {name: FileFacts(**facts) for name, facts in report["files"].items()}
            path.unlink()
        for path in work.folder.rglob("*"):
            name = str(path.relative_to(work.folder))
            if path.is_file() and name not in files:  # copied by the engine itself: states offloaded to NVMe
                files[name] = FileFacts(path.stat().st_size, sha256_of(path))
        manifest = replace(work.manifest, files=files)
        with replacing(work.folder / MANIFEST) as file:
            file.write(manifest.to_json())
        sync_tree(work.folder)
        final = self.folder / f"step_{manifest.step:08d}"
        if final.exists():  # damaged, or left behind by a run that went on from an older one
            discard(final)
        work.folder.rename(final)
        sync_folder(self.folder)
        size = sum(facts.size for facts in files.values())
        self.say(f"saved {final} ({size / 1e6:,.1f} MB)")
        prune(Path(self.config.run_dir), manifest.step, self.config.checkpoint)


class _Reported(Exception):
    """A problem that a rank has described already."""


def merge_states(states: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the states of several slot groups as one: every array has a slot a row."""
    return {key: np.concatenate([state[key] for state in states]) for key in states[0]}


def _common_files(config: Config) -> dict[str, Callable[[BinaryIO], object]]:
    """Return what the first rank writes for all: the configuration and the tokenizer."""
    contents = {"config.yaml": configuration.to_yaml(config).encode()}
    tokenizer = Path(config.data.tokenizer)
    for path in tokenizer.rglob("*"):
        if path.is_file():
            contents[f"tokenizer/{path.relative_to(tokenizer)}"] = path.read_bytes()
    return {name: _bytes_writer(content) for name, content in contents.items()}


def _bytes_writer(content: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(content)


def _report_name(rank: int) -> str:
    return f"report_{rank:05d}.json"


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value).encode())


def _describe(error: Exception) -> str:
    """Return an error as part of a message."""
    if isinstance(error, _Reported):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return f"{type(error).__name__}: {error}."
