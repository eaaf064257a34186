"""What must hold before datasets become one: sound files, one type of integers, end-of-sequence tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.files import sha256_of
from pipeline.data.facts import DatasetFacts
from pipeline.data.indexed import read_index
from pipeline.data.paths import idx_path


def check_eos(facts: Sequence[DatasetFacts], prefixes: Sequence[Path]) -> None:
    """Raise a `UserError` if documents end with the end-of-sequence token in some datasets alone."""
    uses = [_eos_of(fact.options) for fact in facts]
    for prefix, use in zip(prefixes, uses, strict=True):
        if use != uses[0]:
            ends = {frozenset([True]): "with", frozenset([False]): "without"}
            how = [ends.get(frozenset(found), "partly with") for found in (uses[0], use)]
            raise UserError(
                f"{prefixes[0]} was made {how[0]} --append-eos and {prefix} {how[1]} it: preprocess one of "
                "them again, or give --mixed-eos."
            )


def _eos_of(options: dict[str, Any]) -> set[bool]:
    """Return the values of --append-eos in a dataset, which may be merged of several."""
    if "merged" in options:
        return set().union(*(_eos_of(part["options"]) for part in options["merged"]))
    return {bool(options.get("append_eos"))}


def check_index(prefix: Path, facts: DatasetFacts, dtype: np.dtype[Any]) -> None:
    """Raise a `UserError` if the index of a dataset is damaged, or its integers are of another type."""
    if sha256_of(idx_path(prefix)) != facts.sha256["idx"]:
        raise not_as_written(idx_path(prefix))
    found = read_index(prefix).dtype
    if found != dtype:
        raise UserError(
            f"{prefix} holds {found}, but {dtype} belongs to {facts.vocab_size:,} tokens: preprocess it "
            "again."
        )


def not_as_written(path: Path) -> UserError:
    """Return the error for a file with another hash than PREFIX.json has."""
    return UserError(f"{path} does not match its sha256 in PREFIX.json: restore it, or preprocess it again.")
