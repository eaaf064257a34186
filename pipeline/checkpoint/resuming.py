"""Resume a run from its newest complete checkpoint, under any ZeRO stage and world size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.chains.groups import SlotGroups
from pipeline.checkpoint.manifest import (
    Damaged,
    Identity,
    Manifest,
    check_files,
    check_sizes,
    read_manifest,
    split_step,
    step_folders,
)
from pipeline.checkpoint.saving import merge_states
from pipeline.config import Config
from pipeline.engine.protocol import Engine, FileLayout
from pipeline.ranks import Ranks

GROUPS = "optimizer.decay_norms_and_embeddings"  # orders the optimizer's states


def newest(run_dir: Path, ranks: Ranks, hashes: bool) -> tuple[Path, Manifest] | None:
    """Return the newest complete checkpoint of a run; print which newer ones were skipped and why.

    Every rank calls this. The ranks split the hashing and agree on the result.

    Args:
        run_dir: the run folder.
        ranks: all processes of the run.
        hashes: compare the hashes of the files, not only their sizes.

    Returns:
        The folder and its manifest; None when the run has no checkpoint yet.

    Raises:
        UserError: when checkpoints exist but none is complete; a fresh start would overwrite the run.
    """
    folders = ranks.all_gather(step_folders(run_dir))[0]
    for folder in reversed(folders):
        manifest, problem = None, None
        try:
            manifest = read_manifest(folder)
            if hashes:
                check_files(folder, manifest, ranks)
            else:
                check_sizes(folder, manifest)
        except Damaged as error:
            problem = str(error)
        problem = ranks.first_problem(problem)
        if problem is None and manifest is not None:
            return folder, manifest
        if ranks.is_first:
            print(f"skipped {folder}: {problem}", flush=True)
    if folders:
        raise UserError(
            f"{run_dir} has {len(folders)} checkpoints and none is complete (reasons above): restore one, or "
            "start a new run with another run_dir."
        )
    return None


def check_continues(folder: Path, saved: Manifest, now: Identity, config: Config) -> None:
    """Raise a `UserError` unless a run with `config` may resume from the checkpoint in `folder`."""
    if saved.step > config.train.steps:
        raise UserError(
            f"train.steps is {config.train.steps}, but {folder} is already at step {saved.step}: raise "
            "train.steps, or start a new run with another run_dir."
        )
    before = configuration.load(["--config", str(folder / "config.yaml")])
    pairs = [
        ("engine.kind", kind_of_engine(saved.sharding), kind_of_engine(now.sharding)),
        ("train.global_batch_size", saved.global_batch_size, now.global_batch_size),
        ("optimizer.kind", before.optimizer.kind, config.optimizer.kind),
        ("train.seed", before.train.seed, config.train.seed),
        (GROUPS, before.optimizer.decay_norms_and_embeddings, config.optimizer.decay_norms_and_embeddings),
        *_differences("model", before.model, config.model),
        *_differences("objective", before.objective, config.objective),
        ("the vocabulary", saved.vocabulary, now.vocabulary),
    ]
    if saved.data_fingerprint != now.data_fingerprint:
        harmless = {"data.tokenizer", "data.cache", "data.workers", "data.phases"}
        pairs += [pair for pair in _differences("data", before.data, config.data) if pair[0] not in harmless]
        pairs.append(("the content of data.prefixes", saved.data_fingerprint[:12], now.data_fingerprint[:12]))
    for what, then, new in pairs:
        if then != new:
            branches = not what.startswith(("model.", "the vocabulary", "engine.", "optimizer."))
            start = f" and train.branch_from = {config.run_dir}" if branches else ""
            raise UserError(
                f"{folder} was written with {what} = {then}, the run has {new}: set it back, or start a new "
                f"run with another run_dir{start}."
            )
    _check_ramp(folder, saved.step, before, config)
    _check_same_parent(folder, saved, before, config)
    _check_phases(folder, saved, now, before, config)
    start_from = config.train.initial_weights
    if start_from is not None and before.train.initial_weights is None:
        raise UserError(
            f"train.initial_weights is {start_from}, but the run resumes from {folder}, which was trained "
            "without it: remove the setting, or start a new run with another run_dir."
        )


def _check_phases(folder: Path, saved: Manifest, now: Identity, before: Config, config: Config) -> None:
    """Raise a `UserError` unless the phases of the data that have begun are those of the checkpoint."""
    # A chain that ended at the saved step has begun an example for its next step already.
    begun = saved.step + config.objective.turns
    then, new = (
        [(int(step), sha256) for step, sha256 in phases.items() if int(step) <= begun]
        for phases in (saved.phases, now.phases)
    )
    if then == new:
        return
    number = next(n for n in range(len(then) + len(new)) if then[n : n + 1] != new[n : n + 1])
    settings = [run.data.phases[number : number + 1] if found[number:] else []
                for run, found in ((before, then), (config, new))]  # fmt: skip
    was, is_now = (vars(found[0]) if found else "none" for found in settings)
    what = f"{folder} was written with data.phases[{number}] = {was}, the run has "
    what += "datasets of other content" if was == is_now else str(is_now)
    raise UserError(
        f"{what}: a phase that has begun cannot change. Set it back, or give new phases a first_step of "
        f"{begun + 1} or more."
    )


def _check_ramp(folder: Path, step: int, before: Config, config: Config) -> None:
    """Raise a `UserError` unless the larger batches that have begun are those of the checkpoint of `step`."""
    then, new = (
        [vars(larger) for larger in run.train.batch_ramp if larger.first_step <= step]
        for run in (before, config)
    )
    if then != new:
        raise UserError(
            f"{folder} was written with train.batch_ramp = {then} up to its step, the run has {new}: a batch "
            f"that has begun cannot change. Set it back, or give other batches a first_step of {step + 1} or "
            "more."
        )


def _check_same_parent(folder: Path, saved: Manifest, before: Config, config: Config) -> None:
    """Raise a `UserError` if ``train.branch_from`` names other than the parent of the run in `folder`."""
    given, parent = config.train.branch_from, saved.parent
    if given is None or (parent is not None and given == before.train.branch_from):
        return
    run, step = split_step(given)
    if parent is None or str(run.resolve()) != parent.run or step not in (None, parent.step):
        began = "is no branch" if parent is None else f"branched from {parent}"
        raise UserError(
            f"train.branch_from is {given}, but the run resumes from {folder}, which {began}: remove the "
            "setting, or start a new run with another run_dir."
        )


def kind_of_engine(sharding: str) -> str:
    """Return ``engine.kind`` of a sharding; DeepSpeed's shardings are converted into each other."""
    return "plain" if sharding == "none" else "deepspeed"


def _differences(section: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Return the settings of a section as (name, saved value, current value)."""
    keys = [item.name for item in dataclasses.fields(now)]
    return [(f"{section}.{key}", getattr(before, key), getattr(now, key)) for key in keys]


def load(folder: Path, manifest: Manifest, engine: Engine, groups: SlotGroups) -> None:
    """Restore engine and slots from a checkpoint of any ZeRO stage and world size; every rank calls this.

    Raises:
        UserError: when a file cannot be read.
    """
    groups.begin(manifest.step + 1, manifest.dealt)
    with engine.ranks.agreeing():
        try:
            states = _states_of_slots(folder, manifest, engine.ranks.rank, [group.slots for group in groups])
        except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
            # numpy's advice for a pickle is to run it.
            reason = "a pickle, which could run commands" if "pickle" in str(error) else str(error)
            raise UserError(
                f"the slots in {folder} cannot be read ({reason}): remove it to resume from an older one."
            ) from None
    engine.load(folder / "model", FileLayout(manifest.sharding, manifest.world_size), folder.parent)
    for group, state in zip(groups, states, strict=True):
        group.load_state_dict(state, manifest.step + 1)


def _states_of_slots(
    folder: Path, manifest: Manifest, rank: int, wanted: Sequence[np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """Return the state of each group of slots in `wanted`, from the files of any ranks.

    Read the file of the same rank first: at an unchanged world size it holds all of them.
    """
    everything = set(np.concatenate(wanted).tolist())
    order = [rank] * (rank < manifest.world_size) + [r for r in range(manifest.world_size) if r != rank]
    parts: list[dict[str, np.ndarray]] = []
    for writer in order:
        with np.load(folder / f"slots_{writer:05d}.npz") as file:
            parts.append(dict(file))
        everything -= set(parts[-1]["slots"].tolist())
        if not everything:
            break
    if everything:
        raise KeyError(f"no file holds slot {min(everything)}")
    merged = merge_states(parts)
    row_of = {slot: row for row, slot in enumerate(merged["slots"].tolist())}
    rows = [[row_of[slot] for slot in slots.tolist()] for slots in wanted]
    return [{key: values[each] for key, values in merged.items()} for each in rows]
