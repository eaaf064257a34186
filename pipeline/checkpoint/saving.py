"""Asynchronous, atomic saves.

Every rank copies its state to host memory, and a thread writes the copy to a temporary folder while training
continues. Each rank then writes a report with the hashes of its files. When all reports exist, the first rank
writes the manifest and renames the folder. No thread runs a collective.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from pipeline import config as configuration
from pipeline.base.errors import Failure, why
from pipeline.base.files import (
    FileFacts,
    replacing,
    sha256_of,
    sync_folder,
    sync_tree,
    write_hashed,
    write_json,
)
from pipeline.chains.slots import SlotGroup
from pipeline.checkpoint.manifest import MANIFEST, Manifest
from pipeline.checkpoint.retention import discard, prune
from pipeline.config import Config
from pipeline.data.facts import DatasetFacts
from pipeline.data.tokenizer import FACTS_FILE, TEMPLATE_FILE
from pipeline.data.tokenizer import read_facts as read_tokenizer_facts
from pipeline.engine.protocol import Engine
from pipeline.engine.snapshot import state_bytes

_POLL = 0.05  # seconds between polls for the other ranks' reports
_LAST_MOMENTS = 60.0  # seconds that a failing run waits for a save in progress


@dataclass
class _Work:
    """A save in progress.

    Attributes:
        folder: temporary folder of the files.
        manifest: its manifest, still without files.
        files: writers of this rank's files, by relative path.
        problem: why it failed: on this rank or, on the first rank, on any rank.
        shown: whether the failure was reported to the user.
        written: set when this rank has written its files, or failed.
        given_up: set when the first rank must not wait for more reports.
        thread: the writing thread.
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
        problem: why the last save failed, as of `wait`; None if it succeeded.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        groups: Sequence[SlotGroup],
        facts: Iterable[DatasetFacts],
        say: Callable[[str], None],
    ) -> None:
        """Create the saver of a run.

        Args:
            config: the run.
            engine: provides weights and optimizer state.
            groups: the chains of this rank.
            facts: those of the run's datasets.
            say: prints a message; called from a thread.
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
        # Read now: moving the tokenizer during the run must not break later saves.
        self.common = _common_files(config, facts) if self.first else {}

    def save(self, manifest: Manifest) -> None:
        """Save the current state; every rank calls this between two steps.

        Return when the state is copied or, without ``checkpoint.asynchronous``, when it is on disk. A failed
        save is reported, leaves no files and does not affect other checkpoints.

        Raises:
            Failure: when ``checkpoint.max_failed_saves`` saves in a row have failed.
        """
        self.wait()
        work = _Work(self.folder / f".writing_{manifest.step:08d}", manifest, dict(self.common))
        problem = self.engine.ranks.first_problem(self._make_folder(work.folder) if self.first else None)
        if problem is None:
            states = self.engine.snapshot(work.folder / "model")
            slots = merge_states([group.state_dict() for group in self.groups])
            size = sum(state_bytes(state) for state in states.values())
            work.files |= {f"model/{name}": partial(torch.save, state) for name, state in states.items()}
            packed = io.BytesIO()  # np.savez needs a file that is readable, too
            np.savez(packed, **slots)  # type: ignore[arg-type]  # no slot array is named allow_pickle
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
        """Wait until the last save has finished or failed; every rank calls this, also at the end of a run.

        Raises:
            Failure: when ``checkpoint.max_failed_saves`` saves in a row have failed.
        """
        work, self.work = self.work, None
        if work is None or work.thread is None:
            return
        work.written.wait()
        problem = self.engine.ranks.first_problem(work.problem)
        if problem is not None:
            work.given_up.set()  # the failed rank may not have been able to write its report
        work.thread.join()
        problem = self.engine.ranks.first_problem(problem or work.problem)
        if problem is None:
            self.failures, self.problem = 0, None
        else:
            self._failed(work, problem)

    def writing(self) -> bool:
        """Return whether this rank is still writing the last save."""
        return self.work is not None and self.work.thread is not None and self.work.thread.is_alive()

    def close(self) -> None:
        """Wait a limited time for a save in progress, without communication between ranks.

        For runs that end with an error; after `wait` it does nothing.
        """
        if self.work is not None and self.work.thread is not None:
            self.work.thread.join(_LAST_MOMENTS)

    def _failed(self, work: _Work, problem: str) -> None:
        """Count a failed save; every rank calls this."""
        self.failures, self.problem = self.failures + 1, problem
        limit = self.config.checkpoint.max_failed_saves
        if self.first:
            shutil.rmtree(work.folder, ignore_errors=True)
            self._report_failure(work, problem)
        if self.failures >= limit:
            raise Failure(
                f"{self.failures} saves in a row have failed (checkpoint.max_failed_saves), the last one: "
                f"{problem} Older checkpoints are intact: fix the problem and rerun the same command."
            )

    def _report_failure(self, work: _Work, problem: str) -> None:
        if not work.shown:
            self.say(f"saving step {work.manifest.step} FAILED: {problem} Training continues.")
        work.shown = True

    def _make_folder(self, folder: Path) -> str | None:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "model").mkdir(parents=True)
        except OSError as error:
            return _describe(error)
        return None

    def _lack_of_space(self, size: int) -> str | None:
        """Return a message if the disk lacks space for a checkpoint; `size` is this rank's share in bytes."""
        facts = self.engine.ranks.all_gather((size, shutil.disk_usage(self.folder).free if self.first else 0))
        need, free = sum(size for size, _ in facts), facts[0][1]
        if need <= free:
            return None
        return (
            f"a checkpoint needs {need / 1e6:,.1f} MB, but {self.folder} has {free / 1e6:,.1f} MB free: make "
            "room, or lower checkpoint.keep."
        )

    def _run(self, work: _Work) -> None:
        """Write this rank's files and, on the first rank, commit the checkpoint; runs in a thread."""
        report = work.folder / _report_name(self.engine.ranks.rank)
        try:
            files = {name: asdict(write_hashed(work.folder / name, w)) for name, w in work.files.items()}
            write_json(report, {"files": files})
        except Exception as error:
            work.problem = _describe(error)
            try:
                for name in work.files:  # free the space on a full disk
                    (work.folder / name).unlink(missing_ok=True)
                write_json(report, {"problem": work.problem})
            except OSError:  # the file system may be gone
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
        """Wait for the reports of all ranks, write the manifest and rename the folder."""
        files: dict[str, FileFacts] = {}
        for rank in range(self.engine.ranks.world_size):
            path = work.folder / _report_name(rank)
            while not path.exists():
                if work.given_up.wait(_POLL):
                    return  # `wait` reports the reason
            report = json.loads(path.read_bytes())
            if "problem" in report:
                raise _Reported(report["problem"])
            files |= {name: FileFacts(**facts) for name, facts in report["files"].items()}
            path.unlink()
        for path in work.folder.rglob("*"):
            name = str(path.relative_to(work.folder))
            if path.is_file() and name not in files:  # written by the engine: states offloaded to NVMe
                files[name] = FileFacts(path.stat().st_size, sha256_of(path))
        manifest = replace(work.manifest, files=files)
        with replacing(work.folder / MANIFEST) as file:
            file.write(manifest.to_json())
        sync_tree(work.folder)
        final = self.folder / f"step_{manifest.step:08d}"
        if os.path.lexists(final):  # damaged, or left by an earlier attempt; a link may lead nowhere
            discard(final)
        work.folder.rename(final)
        sync_folder(self.folder)
        size = sum(facts.size for facts in files.values())
        self.say(f"saved {final} ({size / 1e6:,.1f} MB)")
        try:
            prune(Path(self.config.run_dir), manifest.step, self.config.checkpoint)
        except OSError as error:  # this save is complete
            self.say(f"an older checkpoint could not be removed: {_describe(error)} Training continues.")


class _Reported(Exception):
    """A problem already described by the rank that had it."""


def merge_states(states: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the states of several slot groups; row i of every array belongs to one slot."""
    return {key: np.concatenate([state[key] for state in states]) for key in states[0]}


def _common_files(config: Config, facts: Iterable[DatasetFacts]) -> dict[str, Callable[[BinaryIO], object]]:
    """Return the writers of the files that only the first rank writes: configuration and tokenizer."""
    contents = {"config.yaml": configuration.to_yaml(config).encode()}
    tokenizer = Path(config.data.tokenizer)
    # Nothing else of the folder: it may hold links to files that are not to be passed on.
    files = (
        (FACTS_FILE, read_tokenizer_facts(tokenizer).model_file) if tokenizer.exists() else ()
    )  # random text has none
    for name in files:
        contents[f"tokenizer/{name}"] = (tokenizer / name).read_bytes()
    templates = frozenset().union(*(each.chat_templates for each in facts))
    if len(templates) == 1:  # else none is that of the model
        contents[f"tokenizer/{TEMPLATE_FILE}"] = next(iter(templates)).encode()
    return {name: _bytes_writer(content) for name, content in contents.items()}


def _bytes_writer(content: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(content)


def _report_name(rank: int) -> str:
    return f"report_{rank:05d}.json"


def _describe(error: Exception) -> str:
    """Return an error as a sentence for a message."""
    if isinstance(error, _Reported):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {why(error)}."
    return f"{type(error).__name__}: {error}."
