"""Retention of checkpoints: which to keep, and removal of the others."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path

from pipeline.checkpoint.manifest import Damaged, Manifest, checkpoints, read_manifest
from pipeline.config import CheckpointConfig


def discard(folder: Path) -> None:
    """Remove a checkpoint; rename it first, so that a partly removed one is never read."""
    removing = folder.with_name(f".removing_{folder.name}")
    shutil.rmtree(removing, ignore_errors=True)
    folder.rename(removing)
    shutil.rmtree(removing, ignore_errors=True)


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


def clear(run_dir: Path) -> None:
    """Remove folders that a killed process left partly written or partly removed."""
    for pattern in (".writing_*", ".removing_*"):
        for left_over in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(left_over, ignore_errors=True)
