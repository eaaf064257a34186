"""What a checkpoint is, how it comes to exist all at once, and how a run goes on from one.

``RUN/checkpoints/step_00000100/`` holds model/ (the engine's own files), one slots_RRRRR.npz a rank (chains
and cursors), config.yaml, tokenizer/ and, written last, manifest.json. It is written under another name and
then renamed: a folder named step_* is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import config as configuration
from pipeline.cli import UserError
from pipeline.config import Config
from pipeline.runtime import Engine
from pipeline.slots import SlotGroup

FORMAT = 1
STEP_FOLDER = re.compile(r"step_(\d{8})")
PACKAGES = ("torch", "deepspeed", "megatron-core", "sentencepiece", "numpy")


@dataclass
class Manifest:
    """The facts of a checkpoint.

    Attributes:
        format: version of the layout.
        step: optimizer steps done.
        world_size: ranks that wrote it.
        global_batch_size: slots.
        vocabulary: the fields of a Vocabulary.
        data_fingerprint: identity of the samples and their order.
        versions: packages that wrote it.
    """

    format: int
    step: int
    world_size: int
    global_batch_size: int
    vocabulary: dict[str, int]
    data_fingerprint: str
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {name: version(name) for name in PACKAGES}
    )


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if STEP_FOLDER.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(path for path in found if (path / "manifest.json").is_file())


def find(path: Path) -> Path:
    """Return the checkpoint meant by `path`: a checkpoint folder itself, or a run's newest.

    Raises:
        UserError: when there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(
            f"{path} holds no checkpoint: give a run folder or one of its checkpoints/step_* folders."
        )
    return found[-1]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint; raise a `UserError` when it cannot be read."""
    path = folder / "manifest.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**values)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {folder} to use an older checkpoint.") from None
    if manifest.format != FORMAT:
        raise UserError(f"{path} has format {manifest.format}, this program reads {FORMAT}.")
    return manifest


def save(config: Config, engine: Engine, groups: Sequence[SlotGroup], manifest: Manifest) -> Path:
    """Write a checkpoint; every rank calls this. Older ones beyond ``checkpoint.keep`` are removed after."""
    folder = Path(config.run_dir) / "checkpoints"
    final = folder / f"step_{manifest.step:08d}"
    writing = folder / f".writing_{manifest.step:08d}"
    if engine.launch.rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    engine.barrier()
    engine.save(writing / "model")
    states = [group.state_dict() for group in groups]
    merged = {key: np.concatenate([state[key] for state in states]) for key in states[0]}
    np.savez(writing / f"slots_{engine.launch.rank:05d}.npz", allow_pickle=False, **merged)
    engine.barrier()
    if engine.launch.rank == 0:
        (writing / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
        shutil.copytree(config.data.tokenizer, writing / "tokenizer")
        (writing / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
        _sync(writing)
        shutil.rmtree(final, ignore_errors=True)
        writing.rename(final)
        _prune(Path(config.run_dir), config.checkpoint.keep)
    engine.barrier()
    return final


def _sync(folder: Path) -> None:
    """Make sure that the files are on the disk before the rename says so."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _prune(run_dir: Path, keep: int) -> None:
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    for left_over in (run_dir / "checkpoints").glob(".writing_*"):
        shutil.rmtree(left_over)


def check_continues(folder: Path, saved: Manifest, now: Manifest, config: Config) -> None:
    """Raise a `UserError` unless a run with `config` may go on from the checkpoint in `folder`."""
    before = configuration.load(["--config", str(folder / "config.yaml")])
    pairs = [
        ("the number of ranks", saved.world_size, now.world_size),
        ("train.global_batch_size", saved.global_batch_size, now.global_batch_size),
        ("train.micro_batch_size", before.train.micro_batch_size, config.train.micro_batch_size),
        ("train.seed", before.train.seed, config.train.seed),
        ("engine.kind", before.engine.kind, config.engine.kind),
        ("model", before.model, config.model),
        ("the vocabulary", saved.vocabulary, now.vocabulary),
        ("the data (data.*, train.seed)", saved.data_fingerprint[:12], now.data_fingerprint[:12]),
        ("objective", before.objective, config.objective),
    ]
    for what, then, new in pairs:
        if then != new:
            raise UserError(
                f"{folder} was written with {what} = {then}, the run has {new}: set it back, or begin a new "
                "run with another run_dir."
            )


def load(folder: Path, engine: Engine, groups: Sequence[SlotGroup]) -> None:
    """Go on from a checkpoint written at the same world size; every rank calls this."""
    engine.load(folder / "model")
    path = folder / f"slots_{engine.launch.rank:05d}.npz"
    with np.load(path) as file:
        merged = dict(file)
    start = 0
    for group in groups:
        rows = slice(start, start + len(group.slots))
        group.load_state_dict({key: value[rows] for key, value in merged.items()})
        start = rows.stop
