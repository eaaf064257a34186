"""PREFIX.parts: one folder per unit, written by a worker and read by the merge.

A part holds tokens, lengths, hashes (with --deduplicate), quarantine.jsonl (if the unit has bad records),
histograms.npy and part.json. It appears by one rename, so a part that exists is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.files import sha256_of
from pipeline.corpus.reading import DAMAGED
from pipeline.corpus.records import remedy, too_many
from pipeline.data.arrays import Array
from pipeline.data.facts import Counts
from pipeline.data.indexed import Part

TOKENS, LENGTHS, HASHES, HISTOGRAMS = "tokens", "lengths", "hashes", "histograms.npy"
QUARANTINE, PART = "quarantine.jsonl", "part.json"
HASH = np.dtype("V16")  # of a document's texts
FEW_CHARACTERS = 1000
REMOVALS = 8  # parts removed at a time


@dataclass(frozen=True)
class PartFacts:
    """The contents of part.json.

    Attributes:
        plan_sha256: sha256 of the partition that the part belongs to.
        counts: what became of the records.
        sha256: of the files of tokens, lengths and hashes.
    """

    plan_sha256: str
    counts: Counts
    sha256: dict[str, str]


def part_folder(folder: Path, unit: int) -> Path:
    """Return the folder of a unit's part."""
    return folder / f"{unit:06d}"


def lock_path(folder: Path, shard: int, shards: int) -> Path:
    """Return the file that the process at work on a shard keeps locked."""
    return folder / f".lock-{shard:05d}-of-{shards:05d}"


def shard_summary_path(folder: Path, shard: int, shards: int) -> Path:
    """Return the summary of a shard's run."""
    return folder / f"summary-{shard:05d}-of-{shards:05d}.json"


def missing_units(folder: Path, units: int) -> list[int]:
    """Return those of the first `units` units that have no part yet."""
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return [unit for unit in range(units) if part_folder(folder, unit).name not in there]


def write_part(folder: Path, facts: PartFacts, histograms: Array) -> None:
    """Write the histograms [2, V] and part.json into the folder of a part."""
    np.save(folder / HISTOGRAMS, histograms)
    (folder / PART).write_text(json.dumps(dataclasses.asdict(facts)) + "\n", encoding="utf-8")


def read_part(folder: Path, unit: int, plan_sha256: str) -> PartFacts:
    """Return the facts of a part.

    Raises:
        UserError: if it is damaged or belongs to another partition.
    """
    path = part_folder(folder, unit) / PART
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        facts = PartFacts(**{**values, "counts": Counts(**values["counts"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(path, f" ({error})") from None
    if facts.plan_sha256 != plan_sha256:
        raise UserError(f"{path} was made from other inputs or options: start over with --restart.")
    return facts


def read_tokens(folder: Path, facts: PartFacts, step: int) -> Part:
    """Return the sequences of a part, `step` per document.

    Raises:
        UserError: if the lengths are not those that part.json says.
    """
    size = (folder / LENGTHS).stat().st_size
    if size != facts.counts.documents * step * 4:
        raise damaged(folder / LENGTHS)
    if sha256_of(folder / LENGTHS) != facts.sha256[LENGTHS]:
        raise damaged(folder / LENGTHS)
    lengths = np.memmap(folder / LENGTHS, np.int32, "r") if size else np.zeros(0, np.int32)
    return Part(folder / TOKENS, lengths)


def read_hashes(folder: Path, facts: PartFacts) -> Array:
    """Return the hashes [documents, 2] uint64 of a part's documents."""
    found = np.fromfile(folder / HASHES, np.uint64).reshape(-1, HASH.itemsize // 8)
    if len(found) != facts.counts.documents or sha256_of(folder / HASHES) != facts.sha256[HASHES]:
        raise damaged(folder / HASHES)
    return found


def damaged(path: Path, detail: str = "") -> UserError:
    """Return the error for a file of a part that is not as it was written."""
    return UserError(f"{path} is damaged{detail}: remove {path.parent} and run the same command again.")


def count_tokens(histograms: Array, tokens: Array, lengths: Array, times: int = 1) -> None:
    """Count token ids into `histograms` [2, V]: row 0 for prompts, row 1 for texts and answers.

    Args:
        histograms: [2, V] int64, updated in place.
        tokens: [sum of lengths], any integer type.
        lengths: [documents, 1] of texts, or [documents, 2] of pairs.
        times: weight of an occurrence; -1 removes the tokens again.
    """
    size = histograms.shape[1]
    if lengths.shape[1] == 1:
        histograms[1] += times * np.bincount(tokens, minlength=size)
        return
    is_answer = np.repeat(np.tile(np.array([False, True]), len(lengths)), lengths.ravel())
    for row, chosen in ((0, ~is_answer), (1, is_answer)):
        histograms[row] += times * np.bincount(tokens[chosen], minlength=size)


def check_bad(
    counts: Counts, folder: Path, units: Sequence[int], limit: float, total_bytes: int, final: bool
) -> None:
    """Raise a `UserError` if more than `limit` is bad: of the records, or of the bytes on the disk.

    Args:
        counts: of the records read so far.
        folder: of the parts.
        units: of this run; the first bad record among their parts is named.
        limit: --max-bad-fraction.
        total_bytes: of the units.
        final: all records have been read; few records are judged only then.
    """
    records = counts.records - counts.blank - counts.empty
    if counts.lost_bytes > limit * total_bytes:
        what = f"{counts.lost_bytes:,} of {total_bytes:,} bytes are in files that cannot be read to their end"
    elif too_many(counts.bad, records, limit, final):
        what = f"{counts.bad:,} of {records:,} records are bad"
    else:
        return
    first = next(path for unit in units if (path := part_folder(folder, unit) / QUARANTINE).exists())
    with first.open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file] if counts.lost_bytes else [json.loads(file.readline())]
    entry = next((entry for entry in entries if entry["reason"] == DAMAGED), entries[0])
    kind, detail = "byte" if "byte" in entry else "row", entry["detail"].rstrip("?")
    raise UserError(
        f"{what}, more than --max-bad-fraction {limit}; the first: "
        f"{entry['file']}, {kind} {entry[kind]}: {detail}. {remedy(entry['reason'])} All are in "
        f"{folder}/*/{QUARANTINE}. Start over with --restart, or raise --max-bad-fraction."
    )


def check_lost(counts: Counts, limit: float) -> None:
    """Raise a `UserError` if more than `limit`, --max-lost-fraction, of the characters are lost.

    A corpus of few characters may lose half of them: one unknown name is a large share of it.
    """
    share = limit if counts.characters >= FEW_CHARACTERS else max(limit, 0.5)
    if counts.lost_characters > share * counts.characters:
        raise UserError(
            f"{counts.lost_characters:,} of {counts.characters:,} characters cannot be decoded again, more "
            f"than --max-lost-fraction {limit}: the tokenizer does not know them. Use one that does (bpe and "
            "unigram know every character), or raise --max-lost-fraction."
        )


def remove_unfinished(folder: Path, units: Sequence[int]) -> None:
    """Remove the unfinished parts that a killed run left of these units."""
    mine = {part_folder(folder, unit).name for unit in units}
    for entry in folder.glob(".*.writing"):
        if entry.name[1:].split(".")[0] in mine:
            shutil.rmtree(entry, ignore_errors=True)


def clear(folder: Path, keep: Collection[Path]) -> None:
    """Remove everything from the folder of the parts except `keep`.

    Parts are removed in parallel: each removal waits for the disk, and thousands in sequence take minutes.
    """

    def remove(entry: Path) -> None:
        # Another shard that finds the dataset complete clears the folder too.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    with ThreadPoolExecutor(REMOVALS) as pool:
        for _ in pool.map(remove, [entry for entry in folder.iterdir() if entry not in keep]):
            pass
