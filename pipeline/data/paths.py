"""The files of a dataset, named by its prefix: a path without suffix, with a name."""

from __future__ import annotations

from pathlib import Path

from pipeline.base.errors import UserError


def bin_path(prefix: Path) -> Path:
    """Return the file of the tokens."""
    return _with_suffix(prefix, ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the index; without it there is no dataset."""
    return _with_suffix(prefix, ".idx")


def facts_path(prefix: Path) -> Path:
    """Return the metadata; see `DatasetFacts`."""
    return _with_suffix(prefix, ".json")


def summary_path(prefix: Path) -> Path:
    """Return the summary of the preprocessing run."""
    return _with_suffix(prefix, ".summary.json")


def quarantine_path(prefix: Path) -> Path:
    """Return the list of the bad records."""
    return _with_suffix(prefix, ".quarantine.jsonl")


def parts_folder(prefix: Path) -> Path:
    """Return the folder of the parts, while the dataset is being made."""
    return _with_suffix(prefix, ".parts")


def _with_suffix(prefix: Path, suffix: str) -> Path:
    if prefix.name in ("", ".."):
        raise UserError(f"the dataset prefix {prefix} is a folder: add a name, such as {prefix / 'corpus'}.")
    return prefix.with_name(prefix.name + suffix)  # `Path.with_suffix` would cut a dot inside the name
