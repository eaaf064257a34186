"""Small datasets on the disk, made in this process as the workers make them, without starting a pool."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.facts import DatasetFacts
from pipeline.data.merge import merge_parts, parts_folder
from pipeline.data.records import Keys
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.units import Options, Plan, make_plan, write_plan
from pipeline.data.words import WordEncoder
from pipeline.data.worker import Job, make_part

TEXT = Keys(("text",))
PAIRS, AS_PAIRS = Keys(("q", "a")), ("--prompt-key", "q", "--answer-key", "a")


def command(corpus: Path, prefix: Path, *more: str, inputs: Sequence[Path | str] = ()) -> list[str]:
    """Return a command line of the tool; text of x.jsonl by one worker unless `more` says otherwise."""
    given = [str(path) for path in inputs or [corpus / "x.jsonl"]]
    return [
        "--input", *given, "--tokenizer", str(corpus / "tokenizer"), "--output-prefix", str(prefix),
        "--workers", "1", *more,
    ]  # fmt: skip


def make_plan_of(
    inputs: Sequence[Path | str],
    tokenizer: Path,
    keys: Keys = TEXT,
    unit_bytes: int | None = None,
    **options: Any,
) -> Plan:
    """Return the plan of a corpus."""
    return make_plan([str(path) for path in inputs], None, tokenizer, Options(keys, **options), unit_bytes)


def make_dataset(
    inputs: Sequence[Path | str],
    tokenizer: Path,
    prefix: Path,
    keys: Keys = TEXT,
    unit_bytes: int | None = None,
    **options: Any,
) -> DatasetFacts:
    """Preprocess a corpus; bad records are quarantined, the parts stay."""
    plan = make_plan_of(inputs, tokenizer, keys, unit_bytes, **options)
    return merge_parts(make_parts(plan, prefix), prefix)[0][1]


def make_parts(plan: Plan, prefix: Path) -> Path:
    """Make all parts of a plan; return their folder."""
    folder = parts_folder(prefix)
    write_plan(plan, folder)
    encoder = WordEncoder(Tokenizer.load(Path(plan.tokenizer)))
    for unit in range(len(plan.units)):
        make_part(Job(plan, folder, "quarantine"), encoder, unit, lambda done, tokens: None)
    return folder


def digests(prefix: Path) -> list[str]:
    """Return the sha256 of a dataset's three files."""
    files = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".json")]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
