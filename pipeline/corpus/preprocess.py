"""From a partition to an indexed dataset: workers make the parts, and the merge joins them as they finish.

No token passes through the parent's Python: it hands out units, counts, and copies finished parts one after
the other. After a kill the same command resumes: finished parts are complete and are not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.base.errors import UserError
from pipeline.base.files import remove_left_overs, write_json
from pipeline.base.progress import MEGABYTE
from pipeline.corpus.merge import merge_parts
from pipeline.corpus.partition import Partition, differences, read_partition, write_partition
from pipeline.corpus.parts import (
    PartFacts,
    check_bad,
    check_lost,
    clear,
    lock_path,
    missing_units,
    read_part,
    remove_unfinished,
    shard_summary_path,
)
from pipeline.corpus.pool import Pool, making
from pipeline.corpus.records import MAX_BAD_FRACTION
from pipeline.corpus.worker import Job
from pipeline.data.facts import Counts, check_replaceable, is_made_from, read_facts
from pipeline.data.paths import facts_path, parts_folder, quarantine_path, summary_path


@dataclass(frozen=True)
class Work:
    """How the work is done; nothing here changes the dataset.

    Attributes:
        workers: processes.
        shard_index: which share of the units this run makes.
        num_shards: number of shares; with more than one, tools/merge_datasets.py joins the parts.
        on_error: quarantine bad records, or fail at the first.
        max_bad_fraction: share of bad records, or of bytes in damaged files, above which the run stops.
        max_lost_fraction: share of characters that cannot be decoded again, above which it stops.
        overwrite: replace an existing dataset.
        restart: discard the parts of an earlier attempt.
        whole_texts: see `Job`.
    """

    workers: int
    shard_index: int = 0
    num_shards: int = 1
    on_error: Literal["quarantine", "fail"] = "quarantine"
    max_bad_fraction: float = MAX_BAD_FRACTION
    max_lost_fraction: float = MAX_BAD_FRACTION
    overwrite: bool = False
    restart: bool = False
    whole_texts: bool = False

    @property
    def shard(self) -> tuple[int, int]:
        """Index and number of shards."""
        return self.shard_index, self.num_shards

    def units_of(self, partition: Partition) -> range:
        """Return the units of this shard."""
        return range(self.shard_index, len(partition.units), self.num_shards)


@dataclass(frozen=True)
class Summary:
    """What a run did, as written to PREFIX.summary.json.

    Attributes:
        complete: whether the dataset is complete.
        nothing_to_do: whether everything existed when the run started.
        counts: of all units of this shard.
        units: of this shard.
        units_done_before: parts that existed when the run started.
        workers: processes.
        seconds: of this run.
        megabytes_per_second: input read by this run.
        tokens_per_second: tokens written by this run.
    """

    complete: bool
    nothing_to_do: bool
    counts: Counts
    units: int
    units_done_before: int
    workers: int
    seconds: float
    megabytes_per_second: float
    tokens_per_second: float


def preprocess(partition: Partition, prefix: Path, work: Work) -> Summary:
    """Write ``prefix``.bin, .idx and .json: the same bytes for any workers, shards and interruptions.

    A text becomes a document of one sequence, a pair a document of two, prompt and answer. With
    --append-eos the end-of-sequence token closes the text or the answer.

    Args:
        partition: of the corpus.
        prefix: path of the dataset, without suffix.
        work: how the work is done.

    Raises:
        UserError: if the corpus or an option changed since the parts were begun; for too many bad records, a
            full disk, a missing input or a worker that died. Finished parts are kept.
    """
    started = time.monotonic()
    folder = parts_folder(prefix)
    check_inputs_are_kept(partition, prefix, work)
    with _locked(folder, work):
        # A kill between the dataset's last file and the end of a run leaves the folder of the parts.
        if not work.restart and is_made_from(partition.sha256, prefix):
            clear(folder, keep=[lock_path(folder, *work.shard)])
            counts = read_facts(prefix).counts
            return _summarise(prefix, counts, partition, work, started, [], 0, nothing_to_do=True)
        partition = _resumed(partition, prefix, work)
        units = work.units_of(partition)
        remove_unfinished(folder, units)
        todo = sorted(set(missing_units(folder, len(partition.units))) & set(units))
        job = Job(partition, folder, work.on_error, work.whole_texts)
        with _disk_errors(prefix), making(job, units, todo, work.workers, work.max_bad_fraction) as pool:
            parts = _finished(pool, job, units, work)
            if work.num_shards == 1:
                counts = merge_parts(folder, prefix, parts=parts)[0][1].counts
            else:
                counts = Counts.total(part.counts for part in parts)
        nothing = work.num_shards > 1 and not todo and len(units) > 0
        summary = _summarise(prefix, counts, partition, work, started, todo, pool.made.tokens, nothing)
        if work.num_shards == 1:
            clear(folder, keep=[lock_path(folder, *work.shard)])
        return summary


def _finished(pool: Pool, job: Job, units: Sequence[int], work: Work) -> Iterator[PartFacts]:
    """Yield the facts of the parts of `units` as they are finished, in order.

    Raises:
        UserError: before the last one, if too much is bad or lost: no dataset was replaced by then.
    """
    sha256, total = job.partition.sha256, Counts()
    for unit in units:
        pool.wait_for(unit)
        part = read_part(job.folder, unit, sha256)
        total = Counts.total([total, part.counts])
        if unit == units[-1]:
            size = sum(job.partition.size_of(number) for number in units)
            check_bad(total, job.folder, units, work.max_bad_fraction, size, final=True)
            check_lost(total, work.max_lost_fraction)
        yield part


def check_inputs_are_kept(partition: Partition, prefix: Path, work: Work) -> None:
    """Raise a `UserError` for an input that the dataset would replace, or that an earlier run wrote."""
    own = [facts_path(prefix), quarantine_path(prefix), _summary_path(prefix, work), parts_folder(prefix)]
    real = {path.resolve() for path in own}
    for source in partition.sources:
        path = Path(source.path).resolve()
        if source.hub is None and not real.isdisjoint((path, *path.parents)):
            raise UserError(
                f"--input {source.path} is a file of the dataset at --output-prefix {prefix}: choose another "
                "prefix."
            )


def _summary_path(prefix: Path, work: Work) -> Path:
    if work.num_shards == 1:
        return summary_path(prefix)
    return shard_summary_path(parts_folder(prefix), *work.shard)


def _summarise(
    prefix: Path, counts: Counts, partition: Partition, work: Work, started: float, made: Sequence[int],
    tokens: int, nothing_to_do: bool,
) -> Summary:  # fmt: skip
    """Write the summary of a run that made some units with so many tokens."""
    seconds = time.monotonic() - started
    units = len(work.units_of(partition))
    size = sum(partition.size_of(unit) for unit in made)
    summary = Summary(
        complete=is_made_from(partition.sha256, prefix),
        nothing_to_do=nothing_to_do,
        counts=counts,
        units=units,
        units_done_before=units - len(made),
        workers=work.workers,
        seconds=round(seconds, 3),
        megabytes_per_second=round(size / MEGABYTE / seconds, 3),
        tokens_per_second=round(tokens / seconds),
    )
    path = _summary_path(prefix, work)
    remove_left_overs(path)
    write_json(path, dataclasses.asdict(summary))
    return summary


@contextlib.contextmanager
def _locked(folder: Path, work: Work) -> Iterator[None]:
    """Refuse a second process on the same shard, if the file system has locks.

    The lock outlives `clear`: NFS cannot remove a file that is open.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = lock_path(folder, *work.shard)
    try:
        with path.open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by a fork
            except BlockingIOError:
                raise UserError(
                    f"{folder}: another process is working on the same shard: wait for it."
                ) from None
            except OSError:  # a file system without locks
                pass
            yield
    finally:
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} == {path.name}:
            shutil.rmtree(folder)  # nothing was begun, or the dataset is complete


def _resumed(partition: Partition, prefix: Path, work: Work) -> Partition:
    """Return the partition of the existing parts; if there are none, write and return `partition`.

    Raises:
        UserError: if the two differ in more than the cut into units; for a dataset that would be replaced
            without --overwrite.
    """
    folder = parts_folder(prefix)
    if work.restart:
        if work.num_shards > 1:
            raise UserError(
                f"--restart would discard the work of other shards: remove {folder} by hand, once for all."
            )
        clear(folder, keep=[lock_path(folder, *work.shard)])
    begun = read_partition(folder)
    if begun is None:
        if not work.overwrite:
            check_replaceable(prefix)
        write_partition(partition, folder)
        return partition
    for what, then, now in differences(begun, partition):
        raise UserError(
            f"{folder} was begun with {what} = {then}, now it is {now}: change it back to resume, or start "
            "over with --restart."
        )
    return begun


@contextlib.contextmanager
def _disk_errors(prefix: Path) -> Iterator[None]:
    """Turn an error of the disk into a message that says that nothing is lost."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        raise UserError(
            f"{error.filename or prefix.parent}: {what}. Fix it and run the same command again: finished "
            f"parts in {parts_folder(prefix)} are kept."
        ) from error
