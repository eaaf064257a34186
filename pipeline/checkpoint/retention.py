"""Retention of checkpoints: which to keep, and removal of the others."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from pathlib import Path

from pipeline.base.errors import UserError, why
from pipeline.checkpoint.manifest import Damaged, Manifest, checkpoints, read_manifest
from pipeline.config import CheckpointConfig


def discard(folder: Path) -> None:
    """Remove a checkpoint; rename it first, so that a partly removed one is never read."""
    removing = folder.with_name(f".removing_{folder.name}")
    _remove(removing)
    folder.rename(removing)
    _remove(removing)


def _remove(path: Path) -> None:
    """Remove a folder, as far as possible; of a link the link alone, not what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def kept(manifests: list[Manifest], config: CheckpointConfig) -> set[int]:
    """Return the steps to keep: the newest, every m-th, and those with the lowest finite held-out loss."""
    steps = sorted(manifest.step for manifest in manifests)
    stay = set(steps[-config.keep :])
    if config.keep_every:
        stay |= {step for step in steps if step % config.keep_every == 0}
    measured = ((m.held_out_loss, m.step) for m in manifests if m.held_out_loss is not None)
    scores = sorted(score for score in measured if math.isfinite(score[0]))  # NaN breaks sorting
    return stay | {step for _, step in scores[: config.keep_best]}


def prune(run_dir: Path, step: int, config: CheckpointConfig) -> None:
    """Remove the checkpoints that `config` does not keep, after the save at `step`.

    Newer checkpoints left by an earlier attempt are kept until training overwrites them. Universal
    checkpoints are removed: they only served to resume this run at another world size.
    """
    manifests = {}
    for folder in checkpoints(run_dir):
        with contextlib.suppress(Damaged):
            manifest = read_manifest(folder)
            if manifest.step <= step:
                manifests[folder] = manifest
    stay = kept(list(manifests.values()), config)
    for folder, manifest in manifests.items():
        if manifest.step not in stay:
            discard(folder)
    remove_conversions(run_dir / "checkpoints")


def remove_conversions(place: Path) -> None:
    """Remove the universal checkpoints in a folder of checkpoints."""
    for folder in place.glob("universal_*"):
        discard(folder)


def prepare(run_dir: Path) -> None:
    """Make the folder of a run's checkpoints; remove what a killed process left partly written or removed.

    Raises:
        UserError: when the folder cannot be written, as a link to a file system that is not mounted: the
            run would begin anew, and lose its training at its end.
    """
    folder = run_dir / "checkpoints"
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing_"):
            pass
    except OSError as error:
        raise UserError(
            f"run_dir: {folder} cannot be written ({why(error)}): make it a writable folder, or give another "
            "run_dir."
        ) from None
    for pattern in (".writing_*", ".removing_*"):
        for left_over in folder.glob(pattern):
            _remove(left_over)
