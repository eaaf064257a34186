"""Manifest of a checkpoint folder: metadata, and the size and hash of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.base.errors import UserError
from pipeline.base.files import FileFacts, sha256_of
from pipeline.base.progress import ReadingProgress

if TYPE_CHECKING:
    from pipeline.ranks import Ranks

FORMAT = 2
MANIFEST = "manifest.json"
AVERAGE = "the average of several checkpoints, without optimizer states"  # as the sharding of one
CONFIG_FILE = "config.json"  # of a folder of transformers; a checkpoint has none
STEP_FOLDER = re.compile(r"step_(\d{8})")
PACKAGES = ("torch", "deepspeed", "megatron-core", "sentencepiece", "numpy")


class Identity(NamedTuple):
    """Metadata that must match between a run and the checkpoint that it resumes from.

    Attributes:
        sharding: how the engine's state is split into files, see `Engine.sharding`.
        global_batch_size: sequences per step.
        vocabulary: the fields of a Vocabulary.
        data_fingerprint: identity of the examples and their order, in the first phase of the data.
        phases: the same of each later phase, by its first step; a later run may have other future ones.
    """

    sharding: str
    global_batch_size: int
    vocabulary: dict[str, int]
    data_fingerprint: str
    phases: dict[str, str]


class Parent(NamedTuple):
    """The checkpoint that a run branched from.

    Attributes:
        run: the run folder, an absolute path.
        step: of the checkpoint.
        manifest_sha256: hash of its manifest.json.
    """

    run: str
    step: int
    manifest_sha256: str

    def __str__(self) -> str:
        """Name it in a line."""
        return f"{self.run}, step {self.step} (manifest {self.manifest_sha256[:12]})"


@dataclass
class Manifest:
    """Metadata of a checkpoint.

    Attributes:
        format: version of the folder layout.
        step: optimizer steps done.
        tokens: tokens seen, over all steps and ranks.
        world_size: ranks that wrote it.
        sharding: see `Identity`.
        global_batch_size: see `Identity`.
        vocabulary: see `Identity`.
        data_fingerprint: see `Identity`.
        phases: see `Identity`.
        held_out_loss: measured at this step; None = not measured.
        guard: the guard's window of past steps, see `Window.to_json`.
        parent: where the run branched from; None for a run of its own.
        dealt: by the first step of each larger batch, the examples that each slot before had begun, see
            `SlotStream.deal`.
        versions: versions of `PACKAGES` that wrote it.
        files: every other file of the folder, by its relative path.
    """

    format: int
    step: int
    tokens: int
    world_size: int
    sharding: str
    global_batch_size: int
    vocabulary: dict[str, int]
    data_fingerprint: str
    phases: dict[str, str] = field(default_factory=dict)
    held_out_loss: float | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    parent: Parent | None = None
    dealt: dict[int, list[int]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in PACKAGES})
    files: dict[str, FileFacts] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the manifest as JSON for `read_manifest`, with a hash of its content."""
        values = dataclasses.asdict(self) | {"parent": self.parent and self.parent._asdict()}
        return (json.dumps(values | {"sha256": _sha256(values)}, indent=2) + "\n").encode()


def _inside(name: str) -> str:
    """Return the name of a file in a checkpoint; raise a ValueError for one that leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name} is outside of the folder")
    return name


def _check_numbers(values: dict[str, Any]) -> None:
    """Raise a ValueError for numbers that no checkpoint has: a manifest may have been edited."""
    vocabulary = values["vocabulary"]
    for tree, names in (
        (values, ("step", "tokens", "world_size", "global_batch_size")),
        (vocabulary, ("rows", "tokens", "mask_id")),
    ):
        for name in names:
            if type(tree[name]) is not int or not 0 <= tree[name] < 2**63:
                raise ValueError(f"{name} is {tree[name]!r}")
    if not vocabulary["mask_id"] < vocabulary["tokens"] <= vocabulary["rows"]:
        raise ValueError(f"vocabulary is {vocabulary}")


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class Damaged(Exception):
    """A checkpoint must not be used; the message says why."""


def step_folders(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, complete or not."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found)


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run that have a manifest, oldest first."""
    return [path for path in step_folders(run_dir) if (path / MANIFEST).is_file()]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        Damaged: when it is missing or cannot be read.
        UserError: when another version of this program wrote it.
    """
    path = folder / MANIFEST
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has format {values['format']}, this program reads {FORMAT}: use the version that "
                "wrote it."
            )
        written = values.pop("sha256", None)  # missing in older checkpoints
        if written is not None and written != _sha256(values):
            raise Damaged(f"the content of its {MANIFEST} has changed since it was written (sha256)")
        files = {_inside(name): FileFacts(**facts) for name, facts in values.pop("files").items()}
        parent = values.pop("parent", None)  # missing in older checkpoints
        dealt = {int(step): begun for step, begun in values.pop("dealt", {}).items()}
        _check_numbers(values)
        return Manifest(**values, parent=parent and Parent(**parent), dealt=dealt, files=files)
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}: it was never finished, or was copied in part") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"its {MANIFEST} cannot be read ({error})") from None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise `Damaged` for the first file that is missing or has another size than in the manifest."""
    for name, facts in sorted(manifest.files.items()):
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if size != facts.size:
            raise Damaged(f"{name} has {size:,} bytes, but was written with {facts.size:,}")


def check_files(
    folder: Path, manifest: Manifest, ranks: Ranks, needed: Callable[[str], bool] = lambda name: True
) -> None:
    """Raise `Damaged` for the first file that differs from the manifest in size or hash.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        ranks: the processes that share the work; this one compares its part of the hashes, and the first
            shows its progress.
        needed: whether to compare the hash of a file, by its name.
    """
    check_sizes(folder, manifest)
    share = sorted(filter(needed, manifest.files))[ranks.rank :: ranks.world_size]
    total = sum(manifest.files[name].size for name in share)
    with closing(ReadingProgress(f"checking {folder}", total, enabled=ranks.is_first)) as progress:
        for name in share:
            try:
                found = sha256_of(folder / name, progress.advance)
            except OSError as error:
                raise Damaged(f"{name} cannot be read ({error.strerror})") from None
            if found != manifest.files[name].sha256:
                raise Damaged(f"the content of {name} has changed since it was written (sha256)")


def check_hashes(folder: Path, manifest: Manifest, needed: Callable[[str], bool], ranks: Ranks) -> None:
    """Raise a `UserError` unless the files of a checkpoint that are to be read are as they were written.

    The arguments are those of `check_files`.
    """
    try:
        check_files(folder, manifest, ranks, needed)
    except Damaged as error:
        raise UserError(
            f"{folder}: {error}: restore it, take another checkpoint, or read it as it is with --no-verify."
        ) from None


def is_export(path: Path) -> bool:
    """Return whether a folder is in the format of transformers, and no run or checkpoint."""
    return (path / CONFIG_FILE).is_file()


def split_step(text: str) -> tuple[Path, int | None]:
    """Return the path and the step of RUN:STEP; the step is None in any other path."""
    run, colon, step = text.rpartition(":")
    if colon and step.isdecimal() and not Path(text).exists():
        return Path(run), int(step)
    return Path(text), None


def find(path: Path) -> tuple[Path, Manifest]:
    """Return the checkpoint at `path`: a checkpoint folder, RUN:STEP, or a run (its newest complete one).

    Compare sizes, but not hashes.

    Raises:
        UserError: when it is missing or damaged.
    """
    run, step = split_step(str(path))
    if step is not None:
        path = run / "checkpoints" / f"step_{step:08d}"
        there = [str(int(folder.name.removeprefix("step_"))) for folder in step_folders(run)]
        if not path.exists() and there:
            raise UserError(f"{run} has no checkpoint of step {step}: choose from {', '.join(there)}.")
    given = (path / MANIFEST).is_file() or STEP_FOLDER.fullmatch(path.name)  # a copy may have any name
    found = [path] if given else step_folders(path)[::-1]
    if not found or not path.is_dir():
        raise UserError(
            f"{path} holds no checkpoint: give a run folder or one of its checkpoints/step_* folders."
        )
    problems = []
    for folder in found:
        try:
            manifest = read_manifest(folder)
            check_sizes(folder, manifest)
            return folder, manifest
        except Damaged as error:
            problems.append(f"{folder}: {error}")
    raise UserError(f"{path} holds no complete checkpoint ({'; '.join(problems)}): restore one.")
