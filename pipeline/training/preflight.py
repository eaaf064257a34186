"""Checks before a run starts: data, initial weights, parent, DeepSpeed's settings, disk space."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from pipeline.base.errors import UserError
from pipeline.checkpoint.branching import find_parent
from pipeline.checkpoint.manifest import checkpoints
from pipeline.config import Config
from pipeline.data.blend import estimated_shares
from pipeline.data.facts import DatasetFacts, check_data
from pipeline.data.paths import idx_path
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.build import engine_settings
from pipeline.evaluation.scorers import find_scorer
from pipeline.huggingface.initial import open_initial_weights
from pipeline.model.batch import Vocabulary
from pipeline.planning.memory import FULL, HALF, Zero, count_parameters
from pipeline.planning.run_plan import checkpoint_bytes, kept_checkpoints


def check_run(
    config: Config, tokenizer: Tokenizer, world_size: int | None = None, disk: bool = True
) -> dict[str, DatasetFacts]:
    """Return the facts of the data, by prefix; raise a `UserError` for the first problem.

    Args:
        config: the run.
        tokenizer: its tokenizer.
        world_size: number of ranks, if known.
        disk: also check the disk space; one rank does.
    """
    facts = check_data(config.data, tokenizer)
    check_samples(config, facts)
    check_engine(config, tokenizer, world_size, disk)
    return facts


def check_engine(
    config: Config, tokenizer: Tokenizer, world_size: int | None = None, disk: bool = True
) -> None:
    """Check what `check_run` does, apart from the training data: they may not exist yet."""
    for number, task in enumerate(config.evaluation.tasks):
        data = Path(task.data)
        if not data.is_file() and not (task.samples_text and idx_path(data).is_file()):
            raise UserError(
                f"evaluation.tasks[{number}].data is {task.data}: there is no such file. Name the file "
                "of the items, or leave the task out."
            )
        if task.scorer is not None:
            find_scorer(Path(task.scorer), f"evaluation.tasks[{number}].scorer")
    vocabulary = read_vocabulary(config, tokenizer)
    check_beginning(config, vocabulary)
    settings = engine_settings(config, world_size)
    if disk:
        check_disk(config, Zero.of(settings), vocabulary.rows)


def read_vocabulary(config: Config, tokenizer: Tokenizer) -> Vocabulary:
    """Return the model's vocabulary; raise a `UserError` if the tokenizer has more tokens than the model."""
    tokens = tokenizer.vocab_size
    rows = config.model.rows_for(tokens)
    if rows < tokens:
        raise UserError(
            f"model.vocab_size is {rows}, but {config.data.tokenizer} has {tokens} tokens: raise it to "
            f"{tokens} or more, or leave it out."
        )
    return Vocabulary(rows, tokens, tokenizer.mask)


def check_beginning(config: Config, vocabulary: Vocabulary) -> None:
    """Raise a `UserError` if a run without checkpoints cannot begin from its initial weights or parent."""
    if checkpoints(Path(config.run_dir)):
        return
    if config.train.branch_from is not None:
        find_parent(config, vocabulary)
    folder = config.train.initial_weights
    if folder is not None:
        open_initial_weights(Path(folder), config.model, vocabulary, Path(config.data.tokenizer))


def check_samples(config: Config, facts: Mapping[str, DatasetFacts]) -> None:
    """Raise a `UserError` for fewer training examples in a phase than slots, or no validation examples."""
    check_validation(config, float(config.data.split.split(",")[1]) > 0)
    for section, _, data in config.data.by_phase():
        examples = sum(share.examples for share in estimated_shares(data, facts))
        if examples < config.slots:
            ramp = config.train.batch_ramp
            batch = "the largest batch of train.batch_ramp" if ramp else "train.global_batch_size"
            batch += " x objective.turns"
            raise UserError(
                f"{section}.prefixes = {', '.join(data.prefixes)} give about {examples} training examples of "
                f"data.sequence_length = {data.sequence_length}, fewer than {batch} = {config.slots}: bring "
                "more text, or lower the batch."
            )


def check_validation(config: Config, exists: bool) -> None:
    """Raise a `UserError` if evaluations are on and no validation example `exists`."""
    if config.evaluation.interval and not exists:
        drops = config.data.too_long == "drop"
        fitting = f" of up to {config.data.sequence_length} tokens" if drops else ""
        raise UserError(
            f"data.split = {config.data.split!r} gives no validation example{fitting} of "
            f"{', '.join(config.data.prefixes)}: give validation a larger share, or set evaluation.interval "
            "to 0."
        )


def check_disk(config: Config, zero: Zero, vocabulary_rows: int) -> None:
    """Raise a `UserError` if the disk has no room for the checkpoints that exist at once.

    Only for a run without checkpoints: later, saves survive a disk that is full for a while.
    """
    run_dir = Path(config.run_dir).absolute()
    if checkpoints(run_dir):
        return
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    width = FULL if config.engine.precision == "fp32" else HALF
    parameters = count_parameters(config, vocabulary_rows)
    each, number = checkpoint_bytes(config, zero, parameters, width), kept_checkpoints(config)
    free, needed = shutil.disk_usage(existing).free, number * each
    if needed > free:
        raise UserError(
            f"run_dir = {config.run_dir}: up to {number} checkpoints of {tqdm.format_sizeof(each, 'B')} are "
            f"kept at once, {tqdm.format_sizeof(needed, 'B')}, and {existing} has "
            f"{tqdm.format_sizeof(free, 'B')} free: name "
            "another run_dir, or keep fewer by checkpoint.keep, keep_best, keep_every."
        )
