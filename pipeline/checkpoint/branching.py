"""The checkpoint of another run that a new run branches from (``train.branch_from``).

The new run takes weights, optimizer state, moving average and step from it, and everything else from its own
settings. Nothing is written to the other run, and once the new one has a checkpoint it no longer needs it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.base.files import sha256_of
from pipeline.checkpoint.manifest import (
    AVERAGE,
    MANIFEST,
    Damaged,
    Manifest,
    Parent,
    check_files,
    find,
    split_step,
)
from pipeline.checkpoint.resuming import GROUPS, kind_of_engine
from pipeline.config import Config
from pipeline.data.tokenizer import read_facts
from pipeline.model.batch import Vocabulary
from pipeline.ranks import Ranks

# Settings of the model that a branch may change: the initial weights, which it has not, and the positions,
# which are stretched for longer sequences.
FREE = ("init_std", "rope_theta", "rope_factor", "rope_original_length")


def find_parent(config: Config, vocabulary: Vocabulary) -> tuple[Path, Manifest]:
    """Return the checkpoint that ``train.branch_from`` names; compare sizes, but not hashes.

    Raises:
        UserError: when it is missing or damaged, is of this run, or does not fit the run's model.
    """
    given = str(config.train.branch_from)
    if split_step(given)[0].resolve() == Path(config.run_dir).resolve():
        raise UserError(
            f"train.branch_from is {given}, which is the run itself (run_dir): name another run, or leave it "
            "out to resume."
        )
    try:
        folder, saved = find(Path(given))
        before = configuration.load(["--config", str(folder / "config.yaml")])
    except UserError as error:
        raise UserError(f"train.branch_from: {error}") from None
    if saved.sharding == AVERAGE:
        raise UserError(
            f"train.branch_from is {given}, {AVERAGE}: name it in train.initial_weights instead, or branch "
            "from a run."
        )
    if saved.step >= config.train.steps:
        raise UserError(
            f"train.steps is {config.train.steps}, but train.branch_from = {given} is already at step "
            f"{saved.step}: the branch counts on from there; raise train.steps."
        )
    own = folder / "tokenizer"
    if own.exists() and read_facts(own).sha256 != read_facts(Path(config.data.tokenizer)).sha256:
        raise UserError(
            f"train.branch_from = {given} has another tokenizer than data.tokenizer = "
            f"{config.data.tokenizer}: set it to {own}, and preprocess the data with it."
        )
    theirs = _fixed(before, kind_of_engine(saved.sharding), saved.vocabulary["rows"])
    ours = _fixed(config, config.engine.kind, vocabulary.rows)
    for key, there in theirs.items():
        if there != ours[key]:
            raise UserError(
                f"train.branch_from = {given} was trained with {key} = {there}, the run has {ours[key]}: set "
                f"it to {there}, or begin a run of its own."
            )
    return folder, saved


def parent_of(folder: Path, saved: Manifest) -> Parent:
    """Return what a branch remembers of the checkpoint in `folder`."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder  # a copy may lie anywhere
    return Parent(str(run.resolve()), saved.step, sha256_of(folder / MANIFEST))


def check_state(folder: Path, saved: Manifest, hashes: bool, ranks: Ranks) -> None:
    """Raise a `UserError` for damaged weights or states; the ranks share the work, see `check_files`."""
    try:
        check_files(folder, saved, ranks, lambda name: hashes and name.startswith("model/"))
    except Damaged as error:
        raise UserError(
            f"train.branch_from: {folder}: {error}: restore it, or branch from another step."
        ) from None


def _fixed(config: Config, kind: str, rows: int) -> dict[str, Any]:
    """Return the settings in which a branch and its parent agree, by name.

    Args:
        config: of the run.
        kind: of its engine.
        rows: of its embedding.
    """
    model = config.model
    values = {key: value for key, value in asdict(model).items() if key not in FREE}
    values |= {"kv_heads": model.kv_heads or model.heads, "head_size": model.head_width, "vocab_size": rows}
    fixed = {f"model.{key}": value for key, value in values.items()}
    optimizer = config.optimizer
    return fixed | {
        "engine.kind": kind,
        "optimizer.kind": optimizer.kind,
        GROUPS: optimizer.decay_norms_and_embeddings,
    }
