"""Parts to one dataset or a blend of shards, and datasets to one; duplicates are left out here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.files import remove_left_overs, replacing, sha256_of
from pipeline.base.progress import Progress
from pipeline.corpus.plan import Plan, read_plan
from pipeline.corpus.worker import (
    HASH,
    HASHES,
    HISTOGRAMS,
    LENGTHS,
    QUARANTINE,
    TOKENS,
    PartFacts,
    count_tokens,
    part_folder,
    read_part,
)
from pipeline.data.arrays import Array
from pipeline.data.facts import (
    FORMAT,
    LENGTH_BINS,
    Counts,
    DatasetFacts,
    check_same,
    is_facts,
    length_histogram,
    named_lengths,
    read_facts,
    write_facts,
)
from pipeline.data.indexed import (
    Chunk,
    Part,
    bin_path,
    facts_path,
    idx_path,
    read_index,
    token_dtype,
    write_dataset,
)
from pipeline.data.tokenizer import Tokenizer

HASHES_AT_ONCE = 2**25  # of a partition: about 1.5 GB while it is sorted
SHUFFLED_AT_ONCE = 2**12  # documents
MEGABYTE = 1e6


def parts_folder(prefix: Path) -> Path:
    """Return the folder of the parts that a dataset is joined from."""
    return prefix.with_name(prefix.name + ".parts")


def quarantine_path(prefix: Path) -> Path:
    """Return the path of the records that were left out because they are bad."""
    return prefix.with_name(prefix.name + ".quarantine.jsonl")


def existing(prefix: Path) -> Path | None:
    """Return what a dataset at `prefix` would replace: an older one's index, or somebody's PREFIX.json.

    A dataset without an index is none.
    """
    if idx_path(prefix).exists():
        return idx_path(prefix)
    path = facts_path(prefix)
    return path if path.exists() and not is_facts(path) else None


def missing_units(plan: Plan, folder: Path) -> list[int]:
    """Return the units whose parts are not there yet."""
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return [unit for unit in range(len(plan.units)) if part_folder(folder, unit).name not in there]


def _plan_of(folder: Path, whole: bool) -> Plan:
    """Return the plan of a folder of parts; raise a `UserError` where it has none, or has to be `whole`."""
    plan = read_plan(folder)
    if plan is None:
        raise UserError(f"{folder} holds no plan of parts: make them with tools/preprocess_data.py.")
    missing = missing_units(plan, folder) if whole else []
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(plan.units)} parts are missing, unit {missing[0]} first: run "
            "tools/preprocess_data.py again for the shards that have not ended; what is done is kept."
        )
    return plan


class _Tally:
    """What is counted of the documents that are really written."""

    def __init__(self, vocab_size: int, step: int) -> None:
        self.step = step
        self.longest = self.tokens = 0
        self.lengths = np.zeros(LENGTH_BINS, np.int64)
        self.histograms = np.zeros((2, vocab_size), np.int64)

    def add(self, lengths: Array) -> None:
        """Count documents by the lengths of their sequences."""
        sizes = lengths.reshape(-1, self.step).sum(axis=1, dtype=np.int64)
        self.longest = max(self.longest, int(sizes.max(initial=0)))
        self.tokens += int(sizes.sum())
        self.lengths += length_histogram(sizes)


def merge_parts(
    folder: Path, prefix: Path, shards: int = 1, wait_for: Callable[[int], object] | None = None
) -> list[tuple[Path, DatasetFacts]]:
    """Write the dataset of whole parts, or a blend of `shards` datasets with consecutive units each.

    Args:
        folder: of the parts, which is left as it is.
        prefix: path of the dataset; of a shard with -00000-of-00008 behind it.
        shards: number of datasets.
        wait_for: called before the part of a unit is read, returns when it is there; may raise. Without it
            all are there. Nothing takes the place of an older dataset before the last one is.

    Returns:
        Prefix and facts of each dataset.

    Raises:
        UserError: for missing parts, or a dataset without a document.
    """
    plan = _plan_of(folder, whole=wait_for is None)
    if shards > 1 and plan.options.shuffle_seed is not None:
        raise UserError("--shards goes with datasets in the order of their input: --shuffle-seed makes one.")
    if not 1 <= shards <= max(1, len(plan.units)):
        raise UserError(f"--shards is {shards}: it must be from 1 to the number of parts, {len(plan.units)}.")

    def part_of(unit: int) -> PartFacts:
        if wait_for is not None:
            wait_for(unit)
        return read_part(folder, unit, plan.sha256)

    units = range(len(plan.units))
    keep = None
    if plan.options.deduplicate:
        keep = find_first(folder, [part_of(unit) for unit in units])
    size = None if wait_for else round(_size(folder, len(units)) / MEGABYTE, 1)
    made = []
    with closing(Progress(size, 0, "MB joined")) as progress:
        for number, chosen in enumerate(np.array_split(np.array(units, np.int64), shards)):
            name = prefix.name if shards == 1 else f"{prefix.name}-{number:05d}-of-{shards:05d}"
            target = prefix.with_name(name)
            made.append(
                (target, _write_shard(plan, folder, part_of, chosen.tolist(), target, keep, progress))
            )
    return made


def _size(folder: Path, units: int) -> int:
    return sum((part_folder(folder, unit) / TOKENS).stat().st_size for unit in range(units))


def _write_shard(
    plan: Plan, folder: Path, part_of: Callable[[int], PartFacts], units: list[int], prefix: Path,
    keep: list[Array] | None, progress: Progress,
) -> DatasetFacts:  # fmt: skip
    """Write one dataset from some units, its quarantine and its facts, which come last."""
    tokenizer = Tokenizer.load(Path(plan.tokenizer))
    dtype, pairs = token_dtype(tokenizer.vocab_size), plan.options.keys.is_pair
    tally = _Tally(tokenizer.vocab_size, 2 if pairs else 1)
    found: list[Counts] = []
    before = progress.done

    def chunks() -> Iterator[Chunk]:
        for unit in units:
            facts = part_of(unit)
            part = read_tokens(part_folder(folder, unit), facts, tally.step)
            hashed = beside.submit(sha256_of, part.tokens)
            tally.histograms += np.load(part_folder(folder, unit) / HISTOGRAMS)
            found.append(facts.counts)
            kept = None if keep is None else keep[unit]
            for tokens, lengths in _kept(part, dtype, kept, tally, facts.counts):
                tally.add(lengths)
                yield tokens, lengths
                progress.advance(round(before + tally.tokens * dtype.itemsize / MEGABYTE, 1))
            if hashed.result() != facts.sha256[TOKENS]:
                raise UserError(
                    f"{part.tokens} is damaged: remove {part.tokens.parent} and run the same again."
                )
        counts = Counts.total(found)
        if counts.documents + counts.duplicates == 0:
            numbers = sorted({span.source for unit in units for span in plan.units[unit]})
            names = ", ".join(plan.sources[number].path for number in numbers[:3] or range(len(plan.sources)))
            remedy = "" if len(units) == len(plan.units) else f" for {prefix.name}: give fewer --shards"
            raise UserError(f"--input {names}: no document in it ({counts.describe()}){remedy}.")
        _join_quarantine(folder, units, prefix)

    def facts_with(sha256: dict[str, str]) -> DatasetFacts:
        counts = Counts.total(found)
        counts.check()
        return DatasetFacts(
            format=FORMAT,
            kind="pairs" if pairs else "text",
            tokenizer=plan.tokenizer,
            tokenizer_sha256=plan.tokenizer_sha256,
            special_ids=tokenizer.special_ids,
            vocab_size=tokenizer.vocab_size,
            options=plan.options.to_json(),
            plan_sha256=plan.sha256,
            counts=counts,
            longest_document=tally.longest,
            length_histogram=named_lengths(tally.lengths),
            token_histogram=tally.histograms[1].tolist(),
            prompt_histogram=tally.histograms[0].tolist() if pairs else [],
            sha256=sha256,
        )

    with ThreadPoolExecutor(1) as beside:  # hashes a part while it is copied
        source = chunks()
        if plan.options.shuffle_seed is not None:
            write_dataset(source, folder / "in_order", dtype, pairs)
            source = shuffled(folder / "in_order", plan.options.shuffle_seed)
        return _write(source, prefix, dtype, pairs, facts_with)


def _write(
    chunks: Iterator[Chunk], prefix: Path, dtype: np.dtype[Any], pairs: bool,
    facts_with: Callable[[dict[str, str]], DatasetFacts],
) -> DatasetFacts:  # fmt: skip
    """Write a dataset with its facts."""
    made = []

    def write_json(sha256: dict[str, str]) -> None:
        made.append(facts_with(sha256))
        write_facts(made[0], prefix)

    write_dataset(chunks, prefix, dtype, pairs, write_json)
    return made[0]


def read_tokens(folder: Path, facts: PartFacts, step: int) -> Part:
    """Return the tokens and lengths of a part; raise a `UserError` where a file is not as part.json says."""
    size = (folder / LENGTHS).stat().st_size
    if size != facts.counts.documents * step * 4:
        raise UserError(f"{folder / LENGTHS} is damaged: remove {folder} and run the same again.")
    lengths = np.memmap(folder / LENGTHS, np.int32, "r") if size else np.zeros(0, np.int32)
    return Part(folder / TOKENS, lengths)


def _kept(
    part: Part, dtype: np.dtype[Any], keep: Array | None, tally: _Tally, counts: Counts
) -> Iterator[Chunk]:
    """Yield what is kept of a part; take the rest out of the counts."""
    if keep is None or keep.all():
        yield from part.chunks(dtype)
        return
    sequences = np.repeat(keep, tally.step)
    for tokens, lengths in part.chunks(dtype, ~sequences):
        pairs = lengths.reshape(-1, tally.step)
        count_tokens(tally.histograms, tokens, pairs, times=-1)
        counts.duplicates += len(pairs)
        counts.documents -= len(pairs)
        counts.tokens -= len(tokens)
    yield from part.chunks(dtype, sequences)


def find_first(folder: Path, facts: Sequence[PartFacts]) -> list[Array]:
    """Return which documents [documents] bool of each part are the first with their texts.

    Hashes are sorted in partitions, so memory is 1 byte a document and about 1.5 GB for a partition; the
    files of hashes, 16 bytes a document, are read once a partition.
    """
    documents = sum(part.counts.documents for part in facts)
    keep = np.ones(documents, bool)
    partitions = -(-documents // HASHES_AT_ONCE)
    for partition in range(partitions):
        hashes, numbers, first = [], [], 0
        for unit, part in enumerate(facts):
            found = np.fromfile(part_folder(folder, unit) / HASHES, np.uint64).reshape(-1, HASH.itemsize // 8)
            if len(found) != part.counts.documents:
                raise UserError(f"{part_folder(folder, unit) / HASHES} is damaged: remove its folder.")
            chosen = np.flatnonzero(found[:, 0] % np.uint64(partitions) == partition)
            hashes.append(found[chosen])
            numbers.append(chosen + first)
            first += len(found)
        table, number = np.concatenate(hashes), np.concatenate(numbers)
        order = np.lexsort((table[:, 1], table[:, 0]))  # stable: equal hashes stay in the order of the input
        same = (table[order[1:]] == table[order[:-1]]).all(axis=1)
        keep[number[order[1:][same]]] = False
    return np.split(keep, np.cumsum([part.counts.documents for part in facts], dtype=np.int64)[:-1])


def shuffled(prefix: Path, seed: int) -> Iterator[Chunk]:
    """Yield the documents of a dataset in a random order; memory is 8 bytes a document, reads are random."""
    index = read_index(prefix)
    step = 1 if index.modes is None else 2
    tokens = np.memmap(bin_path(prefix), index.dtype, "r")
    order = np.random.default_rng(seed).permutation(index.documents)
    for first in range(0, len(order), SHUFFLED_AT_ONCE):
        documents = order[first : first + SHUFFLED_AT_ONCE]
        sequences = (documents[:, None] * step + np.arange(step)).ravel()
        lengths = index.lengths[sequences]
        starts = index.offsets[sequences] // index.dtype.itemsize
        shift = starts - (np.cumsum(lengths, dtype=np.int64) - lengths)
        yield tokens[np.repeat(shift, lengths) + np.arange(lengths.sum(dtype=np.int64))], lengths


def _join_quarantine(folder: Path, units: Sequence[int], prefix: Path) -> None:
    files = [part_folder(folder, unit) / QUARANTINE for unit in units]
    files = [path for path in files if path.exists()]
    remove_left_overs(quarantine_path(prefix))
    if not files:
        quarantine_path(prefix).unlink(missing_ok=True)
        return
    with replacing(quarantine_path(prefix)) as file:
        for path in files:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file)


def merge_datasets(prefixes: Sequence[Path], output: Path) -> DatasetFacts:
    """Write one dataset with the documents of several, in their order.

    Raises:
        UserError: for a dataset that is missing or damaged, given twice, or of another tokenizer or kind than
            the first.
    """
    facts = [read_facts(prefix) for prefix in prefixes]
    check_same(facts, [str(prefix) for prefix in prefixes], "datasets")
    real = [prefix.resolve() for prefix in prefixes]
    if output.resolve() in real:
        raise UserError(f"--output-prefix {output} is one of the datasets to merge: name another.")
    for number, prefix in enumerate(prefixes):
        if real[number] in real[:number]:
            raise UserError(f"--datasets: {prefix} is given twice: leave one out.")
    first, pairs = facts[0], facts[0].kind == "pairs"
    dtype = token_dtype(first.vocab_size)
    tally = _Tally(first.vocab_size, 2 if pairs else 1)
    total = sum(bin_path(prefix).stat().st_size for prefix in prefixes)

    def facts_with(sha256: dict[str, str]) -> DatasetFacts:
        prompts = [fact.prompt_histogram for fact in facts]
        return DatasetFacts(
            format=FORMAT,
            kind=first.kind,
            tokenizer=first.tokenizer,
            tokenizer_sha256=first.tokenizer_sha256,
            special_ids=first.special_ids,
            vocab_size=first.vocab_size,
            options={"merged": [{"sha256": fact.sha256, "options": fact.options} for fact in facts]},
            plan_sha256=None,
            counts=Counts.total(fact.counts for fact in facts),
            longest_document=tally.longest,
            length_histogram=named_lengths(tally.lengths),
            token_histogram=np.sum([fact.token_histogram for fact in facts], axis=0).tolist(),
            prompt_histogram=np.sum(prompts, axis=0).tolist() if pairs else [],
            sha256=sha256,
        )

    with closing(Progress(round(total / MEGABYTE, 1), 0, "MB")) as progress:

        def chunks() -> Iterator[Chunk]:
            for prefix in prefixes:
                for tokens, lengths in Part(bin_path(prefix), read_index(prefix).lengths).chunks(dtype):
                    tally.add(lengths)
                    yield tokens, lengths
                    progress.advance(round(tally.tokens * dtype.itemsize / MEGABYTE, 1))

        return _write(chunks(), output, dtype, pairs, facts_with)


def is_whole(prefix: Path, plan: Plan) -> bool:
    """Whether the dataset at `prefix` is whole and made by this plan."""
    if not facts_path(prefix).exists() or existing(prefix) is None:
        return False
    try:
        return read_facts(prefix).plan_sha256 == plan.sha256
    except UserError:
        return False
