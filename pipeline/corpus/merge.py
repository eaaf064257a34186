"""Parts to one dataset or a blend of several, and datasets to one; duplicates are dropped here."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.files import remove_left_overs, replacing, sha256_of
from pipeline.base.progress import MEGABYTE, Progress
from pipeline.corpus.merge_checks import check_eos, check_index, not_as_written
from pipeline.corpus.partition import Partition, read_partition
from pipeline.corpus.parts import (
    HISTOGRAMS,
    QUARANTINE,
    TOKENS,
    PartFacts,
    count_tokens,
    damaged,
    missing_units,
    part_folder,
    read_hashes,
    read_part,
    read_tokens,
)
from pipeline.data.arrays import Array
from pipeline.data.facts import (
    FORMAT,
    LENGTH_BINS,
    Counts,
    DatasetFacts,
    check_same,
    length_histogram,
    named_lengths,
    package_versions,
    read_facts,
    stored_tokenizer,
    write_facts,
)
from pipeline.data.indexed import Chunk, Part, read_index, token_dtype, write_dataset
from pipeline.data.paths import bin_path, quarantine_path
from pipeline.data.tokenizer import Tokenizer

HASHES_AT_ONCE = 2**25  # sorted at a time, in about 1.5 GB
SHUFFLED_AT_ONCE = 2**12  # documents


def merge_parts(
    folder: Path,
    prefix: Path,
    shards: int = 1,
    parts: Iterator[PartFacts] | None = None,
    tokenizer: Path | None = None,
) -> list[tuple[Path, DatasetFacts]]:
    """Write the dataset of some parts, or a blend of `shards` datasets of consecutive units each.

    An existing dataset stays as it is until the last part has been read.

    Args:
        folder: of the parts; it is left as it is.
        prefix: path of the dataset; a shard adds -00000-of-00008 to it.
        shards: number of datasets.
        parts: the facts of the parts, in order, each as soon as its part exists; None if all exist.
        tokenizer: folder of the tokenizer; None for that of the parts.

    Returns:
        Prefix and facts of each dataset.

    Raises:
        UserError: for missing or damaged parts, or a dataset without a document.
    """
    partition = read_partition(folder)
    if partition is None:
        raise UserError(f"{folder} has no plan.json: make the parts with tools/preprocess_data.py.")
    path = tokenizer or stored_tokenizer(partition.tokenizer, folder)
    loaded = Tokenizer.load(path)
    if loaded.sha256 != partition.tokenizer_sha256:
        raise UserError(f"tokenizer {path} is not the one of {folder}: name that one by --tokenizer.")
    partition = dataclasses.replace(partition, tokenizer=os.path.abspath(path))
    count, total = len(partition.units), None
    if parts is None:
        parts = _all_parts(folder, partition)
        size = sum((part_folder(folder, unit) / TOKENS).stat().st_size for unit in range(count))
        total = round(size / MEGABYTE, 1)
    if shards > 1 and partition.options.shuffle_seed is not None:
        raise UserError("--shards keeps the order of the input: it cannot be combined with --shuffle-seed.")
    if not 1 <= shards <= max(1, count):
        raise UserError(f"--shards is {shards}: it must be from 1 to the number of parts, {count}.")
    keep = None
    if partition.options.deduplicate:
        facts = list(parts)
        parts, keep = iter(facts), find_first(folder, facts)
    made = []
    with closing(Progress(total, 0, "MB joined")) as progress:
        for number, units in enumerate(np.array_split(np.arange(count), shards)):
            name = prefix.name if shards == 1 else f"{prefix.name}-{number:05d}-of-{shards:05d}"
            shard = _Shard(partition, loaded, folder, units.tolist(), prefix.with_name(name))
            made.append((shard.prefix, shard.write(parts, keep, progress)))
    return made


def _all_parts(folder: Path, partition: Partition) -> Iterator[PartFacts]:
    """Return the facts of every part, in order; raise a `UserError` if parts are missing."""
    count = len(partition.units)
    missing = missing_units(folder, count)
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {count} parts are missing, unit {missing[0]} first: run "
            "tools/preprocess_data.py again for the unfinished shards; finished parts are kept."
        )
    return (read_part(folder, unit, partition.sha256) for unit in range(count))


def find_first(folder: Path, facts: Sequence[PartFacts]) -> list[Array]:
    """Return for each part a mask [documents] bool of the documents whose texts did not come before.

    Hashes are sorted in buckets: memory is 1 byte per document and about 1.5 GB for a bucket. The files of
    hashes, 16 bytes per document, are read once per bucket.
    """
    documents = sum(part.counts.documents for part in facts)
    keep = np.ones(documents, bool)
    buckets = -(-documents // HASHES_AT_ONCE)
    for bucket in range(buckets):
        hashes, numbers, first = [], [], 0
        for unit, part in enumerate(facts):
            found = read_hashes(part_folder(folder, unit), part)
            chosen = np.flatnonzero(found[:, 0] % np.uint64(buckets) == bucket)
            hashes.append(found[chosen])
            numbers.append(chosen + first)
            first += len(found)
        table, number = np.concatenate(hashes), np.concatenate(numbers)
        order = np.lexsort((table[:, 1], table[:, 0]))  # stable: equal hashes keep the order of the input
        same = (table[order[1:]] == table[order[:-1]]).all(axis=1)
        keep[number[order[1:][same]]] = False
    return np.split(keep, np.cumsum([part.counts.documents for part in facts], dtype=np.int64)[:-1])


class _Tally:
    """Statistics of the documents that are written."""

    def __init__(self, vocab_size: int, step: int) -> None:
        """Start at zero; a document has `step` sequences."""
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


class _Shard:
    """A dataset made of the parts of some units."""

    def __init__(
        self, partition: Partition, tokenizer: Tokenizer, folder: Path, units: list[int], prefix: Path
    ) -> None:
        self.partition, self.folder, self.units, self.prefix = partition, folder, units, prefix
        self.tokenizer = tokenizer
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.pairs = partition.options.keys.is_pair
        self.tally = _Tally(self.tokenizer.vocab_size, 2 if self.pairs else 1)
        self.counts: list[Counts] = []  # of the parts, without duplicates

    def write(self, parts: Iterator[PartFacts], keep: list[Array] | None, progress: Progress) -> DatasetFacts:
        """Write the dataset, its quarantine and its facts.

        Args:
            parts: the facts of the parts of these units; what follows is left to the next shard.
            keep: of all units; see `find_first`.
            progress: in megabytes of tokens.
        """
        seed = self.partition.options.shuffle_seed
        with ThreadPoolExecutor(1) as hasher:  # hashes a part while it is copied
            chunks = self._chunks(parts, keep, hasher, progress)
            if seed is not None:
                write_dataset(chunks, self.folder / "in_order", self.dtype, self.pairs)
                chunks = shuffled(self.folder / "in_order", seed)
            return _write(chunks, self.prefix, self.dtype, self.pairs, self._facts)

    def _chunks(
        self,
        parts: Iterator[PartFacts],
        keep: list[Array] | None,
        hasher: ThreadPoolExecutor,
        progress: Progress,
    ) -> Iterator[Chunk]:
        before = progress.done
        for unit, facts in zip(self.units, parts, strict=False):
            folder = part_folder(self.folder, unit)
            part = read_tokens(folder, facts, self.tally.step)
            hashed = hasher.submit(sha256_of, part.tokens)
            self.tally.histograms += np.load(folder / HISTOGRAMS)
            self.counts.append(facts.counts)
            for tokens, lengths in self._kept(part, None if keep is None else keep[unit], facts.counts):
                self.tally.add(lengths)
                yield tokens, lengths
                progress.advance(round(before + self.tally.tokens * self.dtype.itemsize / MEGABYTE, 1))
            if hashed.result() != facts.sha256[TOKENS]:
                raise damaged(part.tokens)
        self._check_documents()
        _join_quarantine([part_folder(self.folder, unit) / QUARANTINE for unit in self.units], self.prefix)

    def _kept(self, part: Part, keep: Array | None, counts: Counts) -> Iterator[Chunk]:
        """Yield the sequences of the documents to keep; count the others as duplicates."""
        if keep is None or keep.all():
            yield from part.chunks(self.dtype)
            return
        sequences = np.repeat(keep, self.tally.step)
        for tokens, lengths in part.chunks(self.dtype, ~sequences):
            documents = lengths.reshape(-1, self.tally.step)
            count_tokens(self.tally.histograms, tokens, documents, times=-1)
            counts.duplicates += len(documents)
            counts.documents -= len(documents)
            counts.tokens -= len(tokens)
        yield from part.chunks(self.dtype, sequences)

    def _check_documents(self) -> None:
        """Raise a `UserError` if the parts have no document: training would fail on such a dataset."""
        counts, partition = Counts.total(self.counts), self.partition
        if counts.documents + counts.duplicates:
            return
        numbers = sorted({span.source for unit in self.units for span in partition.units[unit]})
        names = [partition.sources[number].path for number in numbers[:3] or range(len(partition.sources))]
        is_all = len(self.units) == len(partition.units)
        remedy = "" if is_all else f" for {self.prefix.name}: give fewer --shards"
        raise UserError(f"--input {', '.join(names)}: no document in it ({counts.describe()}){remedy}.")

    def _facts(self, sha256: dict[str, str]) -> DatasetFacts:
        counts = Counts.total(self.counts)
        counts.check()
        return DatasetFacts(
            format=FORMAT,
            kind="pairs" if self.pairs else "text",
            tokenizer=self.partition.tokenizer,
            tokenizer_sha256=self.partition.tokenizer_sha256,
            special_ids=self.tokenizer.special_ids,
            vocab_size=self.tokenizer.vocab_size,
            options=self.partition.options.to_json(),
            plan_sha256=self.partition.sha256,
            counts=counts,
            longest_document=self.tally.longest,
            length_histogram=named_lengths(self.tally.lengths),
            token_histogram=self.tally.histograms[1].tolist(),
            prompt_histogram=self.tally.histograms[0].tolist() if self.pairs else [],
            sha256=sha256,
        )


def _write(
    chunks: Iterator[Chunk], prefix: Path, dtype: np.dtype[Any], pairs: bool,
    facts_with: Callable[[dict[str, str]], DatasetFacts],
) -> DatasetFacts:  # fmt: skip
    """Write a dataset and the facts that follow from the sha256 of its files."""
    made = []

    def write_json(sha256: dict[str, str]) -> None:
        made.append(facts_with(sha256))
        write_facts(made[0], prefix)

    write_dataset(chunks, prefix, dtype, pairs, write_json)
    return made[0]


def shuffled(prefix: Path, seed: int) -> Iterator[Chunk]:
    """Yield the documents of a dataset in random order; memory is 8 bytes per document, reads are random."""
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


def _join_quarantine(files: Sequence[Path], prefix: Path) -> None:
    """Write PREFIX.quarantine.jsonl from those of the parts, or remove an older one if there are none."""
    path = quarantine_path(prefix)
    found = [file for file in files if file.exists()]
    remove_left_overs(path)
    if not found:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as target:
        for file in found:
            with file.open("rb") as source:
                shutil.copyfileobj(source, target)


def merge_datasets(prefixes: Sequence[Path], output: Path, mixed_eos: bool = False) -> DatasetFacts:
    """Write one dataset with the documents of several, in their order.

    Args:
        prefixes: the datasets.
        output: path of the new dataset.
        mixed_eos: some documents may end with the end-of-sequence token and others not.

    Raises:
        UserError: for a dataset that is missing, given twice or not as its PREFIX.json says, or that differs
            from the first one in its tokenizer, kind, type of integers or use of end-of-sequence tokens.
    """
    facts = [read_facts(prefix) for prefix in prefixes]
    check_same(facts, [str(prefix) for prefix in prefixes], "datasets")
    if not mixed_eos:
        check_eos(facts, prefixes)
    real = [prefix.resolve() for prefix in prefixes]
    if output.resolve() in real:
        raise UserError(f"--output-prefix {output} is one of the datasets to merge: name another.")
    for number, prefix in enumerate(prefixes):
        if real[number] in real[:number]:
            raise UserError(f"--datasets: {prefix} is given twice: leave one out.")
    first, pairs = facts[0], facts[0].kind == "pairs"
    dtype = token_dtype(first.vocab_size)
    for prefix, fact in zip(prefixes, facts, strict=True):
        check_index(prefix, fact, dtype)
    tally = _Tally(first.vocab_size, 2 if pairs else 1)
    total = sum(bin_path(prefix).stat().st_size for prefix in prefixes)

    def facts_with(sha256: dict[str, str]) -> DatasetFacts:
        prompts = [fact.prompt_histogram for fact in facts]
        return dataclasses.replace(
            first,
            versions=package_versions(),
            options={"merged": [{"sha256": fact.sha256, "options": fact.options} for fact in facts]},
            plan_sha256=None,
            counts=Counts.total(fact.counts for fact in facts),
            longest_document=tally.longest,
            length_histogram=named_lengths(tally.lengths),
            token_histogram=np.sum([fact.token_histogram for fact in facts], axis=0).tolist(),
            prompt_histogram=np.sum(prompts, axis=0).tolist() if pairs else [],
            sha256=sha256,
        )

    with (
        closing(Progress(round(total / MEGABYTE, 1), 0, "MB")) as progress,
        ThreadPoolExecutor(1) as hasher,  # hashes a dataset while it is copied
    ):

        def chunks() -> Iterator[Chunk]:
            for prefix, fact in zip(prefixes, facts, strict=True):
                hashed = hasher.submit(sha256_of, bin_path(prefix))
                for tokens, lengths in Part(bin_path(prefix), read_index(prefix).lengths).chunks(dtype):
                    tally.add(lengths)
                    yield tokens, lengths
                    progress.advance(round(tally.tokens * dtype.itemsize / MEGABYTE, 1))
                if hashed.result() != fact.sha256["bin"]:
                    raise not_as_written(bin_path(prefix))

        return _write(chunks(), output, dtype, pairs, facts_with)
