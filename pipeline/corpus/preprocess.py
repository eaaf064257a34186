"""A corpus to an indexed dataset: a pool of workers makes the parts of a plan, which are joined as they come.

No token goes through the parent's Python: it hands out units, watches the workers, counts, and copies whole
parts behind one another. Killed at any moment, the same command goes on: parts that are there are whole and
are not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

from pipeline.base.errors import UserError
from pipeline.base.files import remove_left_overs, replacing
from pipeline.base.progress import Progress
from pipeline.corpus import worker
from pipeline.corpus.merge import (
    MEGABYTE,
    existing,
    is_whole,
    merge_parts,
    missing_units,
    parts_folder,
    quarantine_path,
)
from pipeline.corpus.plan import Plan, differences, read_plan, write_plan
from pipeline.corpus.records import MAX_BAD_FRACTION, too_many
from pipeline.corpus.worker import QUARANTINE, Board, Job, part_folder, read_part
from pipeline.data.facts import Counts, read_facts
from pipeline.data.indexed import facts_path

POLL_SECONDS = 0.5
REPORT_SECONDS = 10
SILENT_SECONDS = 60  # a worker that has not been heard of for so long is named
REMOVALS = 8  # of parts, at a time


@dataclass(frozen=True)
class Work:
    """How the work is done; none of it changes the dataset.

    Attributes:
        workers: processes.
        shard_index: which share of the units is made here.
        num_shards: shares; with more than one, tools/merge_datasets.py joins the parts.
        on_error: quarantine bad records, or fail at the first.
        max_bad_fraction: share of bad records above which the run stops.
        overwrite: replace an older dataset.
        restart: throw away the parts of an earlier attempt.
        whole_texts: see `Job`.
    """

    workers: int
    shard_index: int = 0
    num_shards: int = 1
    on_error: Literal["quarantine", "fail"] = "quarantine"
    max_bad_fraction: float = MAX_BAD_FRACTION
    overwrite: bool = False
    restart: bool = False
    whole_texts: bool = False


@dataclass(frozen=True)
class Summary:
    """What a run of the preprocessor did, for PREFIX.summary.json.

    Attributes:
        complete: whether the dataset is whole.
        counts: of all the units of this shard.
        units: of this shard.
        units_done_before: parts that were there already.
        workers: processes.
        seconds: of this run.
        megabytes_per_second: of the input, read in this run.
        tokens_per_second: written in this run.
    """

    complete: bool
    counts: Counts
    units: int
    units_done_before: int
    workers: int
    seconds: float
    megabytes_per_second: float
    tokens_per_second: float


def preprocess(plan: Plan, prefix: Path, work: Work) -> Summary:
    """Write ``prefix``.bin, .idx and .json; the same bytes for any workers, shards and interruptions.

    A text is a document of one sequence; a pair is a document of two, prompt and answer. The end-of-sequence
    token closes the text or the answer.

    Args:
        plan: what the dataset is made from.
        prefix: path of the dataset, without suffix.
        work: how.

    Raises:
        UserError: when the corpus or an option has changed since the parts were begun; for too many bad
            records, a full disk, a vanished input or a worker that died. What is done is kept.
    """
    started = time.monotonic()
    folder = parts_folder(prefix)
    check_not_own(plan, prefix, work)
    with _locked(prefix, work):
        if not work.restart and is_whole(prefix, plan):  # also after a kill between its last file and here
            _clear(folder, work)
            return _summarise(prefix, read_facts(prefix).counts, plan, work, started, [], 0)
        plan = _continued(plan, prefix, work)
        mine = list(range(work.shard_index, len(plan.units), work.num_shards))
        _remove_left_overs(folder, mine)
        todo = sorted(set(missing_units(plan, folder)) & set(mine))

        def counts_of(units: Sequence[int]) -> Counts:
            return Counts.total(read_part(folder, unit, plan.sha256).counts for unit in units)

        job = Job(plan, folder, work.on_error, work.whole_texts)
        with _disk_errors(prefix), _workers(job, mine, todo, work) as wait_for:

            def arrived(unit: int) -> None:
                wait_for(unit)
                if unit == mine[-1]:  # all are there, and nothing has been replaced yet
                    _check_bad(counts_of(mine), folder, mine, work, final=True)

            if work.num_shards == 1:  # parts are joined while others are being made
                counts = merge_parts(folder, prefix, wait_for=arrived)[0][1].counts
            else:
                for unit in mine:
                    arrived(unit)
                counts = counts_of(mine)
            made = counts_of(todo)
        summary = _summarise(prefix, counts, plan, work, started, todo, made.tokens)
        if work.num_shards == 1:
            _clear(folder, work)
        return summary


def check_not_own(plan: Plan, prefix: Path, work: Work) -> None:
    """Raise a `UserError` for an input that the dataset would replace, or that an earlier run has written."""
    own = [facts_path(prefix), quarantine_path(prefix), summary_path(prefix, work), parts_folder(prefix)]
    real = {path.resolve() for path in own}
    for source in plan.sources:
        path = Path(source.path).resolve()
        if source.hub is None and not real.isdisjoint((path, *path.parents)):
            raise UserError(
                f"--input {source.path} is a file of the dataset at --output-prefix {prefix} itself: name a "
                "prefix elsewhere."
            )


def summary_path(prefix: Path, work: Work) -> Path:
    """Return the path of a run's summary: beside the dataset, of a shard among the parts."""
    if work.num_shards == 1:
        return prefix.with_name(prefix.name + ".summary.json")
    return parts_folder(prefix) / f"summary-{work.shard_index:05d}-of-{work.num_shards:05d}.json"


def _summarise(
    prefix: Path, counts: Counts, plan: Plan, work: Work, started: float, made: Sequence[int], tokens: int
) -> Summary:
    """Write the summary of a run, which made some units with these tokens."""
    seconds = time.monotonic() - started
    units = len(range(work.shard_index, len(plan.units), work.num_shards))
    size = sum(span.size for unit in made for span in plan.units[unit])
    summary = Summary(
        complete=is_whole(prefix, plan),
        counts=counts,
        units=units,
        units_done_before=units - len(made),
        workers=work.workers,
        seconds=round(seconds, 3),
        megabytes_per_second=round(size / MEGABYTE / seconds, 3),
        tokens_per_second=round(tokens / seconds),
    )
    path = summary_path(prefix, work)
    remove_left_overs(path)
    with replacing(path) as file:
        file.write(json.dumps(dataclasses.asdict(summary), indent=2).encode() + b"\n")
    return summary


@contextlib.contextmanager
def _locked(prefix: Path, work: Work) -> Iterator[None]:
    """Refuse a second process at the same shard, as far as the file system has locks."""
    folder = parts_folder(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    path = _lock_path(folder, work)
    try:
        with path.open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, no forked worker inherits it
            except BlockingIOError:
                raise UserError(
                    f"{folder}: another process is at work on the same shard: wait for it."
                ) from None
            except OSError:  # a file system without locks
                pass
            yield
    finally:
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} == {path.name}:
            shutil.rmtree(folder)  # nothing was begun, or all is done


def _lock_path(folder: Path, work: Work) -> Path:
    return folder / f".lock-{work.shard_index:05d}-of-{work.num_shards:05d}"


def _clear(folder: Path, work: Work) -> None:
    """Remove all from the folder of the parts but the lock, which NFS cannot remove while it is open.

    The parts go side by side: one at a time, thousands of them take minutes, for each waits for the disk.
    """
    lock = _lock_path(folder, work)

    def remove(entry: Path) -> None:
        # Another shard that finds the dataset whole does the same.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    with ThreadPoolExecutor(REMOVALS) as pool:
        for _ in pool.map(remove, [entry for entry in folder.iterdir() if entry != lock]):
            pass


def _continued(plan: Plan, prefix: Path, work: Work) -> Plan:
    """Return the plan of the parts that are there, or begin with `plan`.

    Raises:
        UserError: when it differs in more than the cut into units, or a dataset would be replaced unasked.
    """
    folder = parts_folder(prefix)
    if work.restart:
        if work.num_shards > 1:
            raise UserError(
                f"--restart would throw away what other shards do: remove {folder} yourself, once."
            )
        _clear(folder, work)
    begun = read_plan(folder)
    if begun is None:
        found = existing(prefix)
        if found is not None and not work.overwrite:
            raise UserError(f"{found} exists: give --overwrite to replace it, or another --output-prefix.")
        write_plan(plan, folder)
        return plan
    for what, then, now in differences(begun, plan):
        raise UserError(
            f"{folder} was begun with {what} = {then}, now it is {now}: set it back to go on, or give "
            "--restart to begin anew."
        )
    return begun


def _remove_left_overs(folder: Path, units: Sequence[int]) -> None:
    """Remove the halves of parts that a killed run has left."""
    mine = {part_folder(folder, unit).name for unit in units}
    for entry in folder.glob(".*.writing"):
        if entry.name[1:].split(".")[0] in mine:
            shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(prefix: Path) -> Iterator[None]:
    """Turn what the disk refuses into a message that says that nothing is lost."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        raise UserError(
            f"{error.filename or prefix.parent}: {what}. Mend it and run the same command again: the parts "
            f"that are whole in {parts_folder(prefix)} are kept."
        ) from error


@contextlib.contextmanager
def _workers(
    job: Job, mine: Sequence[int], todo: Sequence[int], work: Work
) -> Iterator[Callable[[int], None]]:
    """Have the parts of the units `todo` made while the block runs.

    Yields:
        A function that returns when the part of a unit is there, and shows meanwhile how far all are.
    """
    if not todo:
        yield lambda unit: None
        return
    sizes = {unit: sum(span.size for span in job.plan.units[unit]) for unit in mine}
    total, before = sum(sizes.values()), sum(sizes.values()) - sum(sizes[unit] for unit in todo)
    workers = min(work.workers, len(todo))
    context = _context(job.plan)
    memory = Board.memory(context, workers)
    board = Board(memory, workers)
    arguments = (job, memory, workers, context.Value("i", 0))
    counts = Counts()
    with ProcessPoolExecutor(workers, context, worker.start, arguments) as pool:
        futures = {pool.submit(worker.work, unit): unit for unit in todo}  # forks, before threads are begun
        ended: SimpleQueue[Future[Counts]] = SimpleQueue()
        for future in futures:
            future.add_done_callback(ended.put)
        missing = set(todo)

        def wait_for(unit: int) -> None:
            nonlocal counts
            while True:
                with contextlib.suppress(Empty):
                    future = ended.get(unit in missing, POLL_SECONDS)
                    missing.remove(futures.pop(future))
                    counts = Counts.total([counts, future.result()])
                watch.show()
                _check_bad(counts, job.folder, mine, work, final=False)
                if unit not in missing:
                    return

        try:
            with closing(_Watch(board, total, before)) as watch:
                yield wait_for
        except BrokenProcessPool:
            raise UserError(
                "a worker died, perhaps for want of memory: run the same command again, with fewer --workers "
                "if it happens again. The parts that are whole are kept."
            ) from None
        finally:
            board.stop()
            pool.shutdown(wait=True, cancel_futures=True)


def _context(plan: Plan) -> BaseContext:
    """Return how workers are started: forked, which takes no time, where all inputs are text.

    A fork must not meet threads and connections, such as pyarrow and `datasets` have in the parent.
    """
    is_text = all(source.format in ("lines", "text") for source in plan.sources)
    return multiprocessing.get_context("fork" if is_text else "spawn")


def _check_bad(counts: Counts, folder: Path, units: Sequence[int], work: Work, final: bool) -> None:
    """Stop at too many bad records; of few records only at the end."""
    records = counts.records - counts.blank
    if not too_many(counts.bad, records, work.max_bad_fraction, final):
        return
    first = next(path for unit in units if (path := part_folder(folder, unit) / QUARANTINE).exists())
    with first.open(encoding="utf-8") as file:
        entry = json.loads(file.readline())
    where = (
        f"{entry['file']}, byte {entry['byte']}"
        if "byte" in entry
        else f"{entry['file']}, row {entry['row']}"
    )
    raise UserError(
        f"{counts.bad:,} of {records:,} records are bad, more than --max-bad-fraction "
        f"{work.max_bad_fraction}; the first: {where}: {entry['detail']}. All are in "
        f"{folder}/*/{QUARANTINE}. Mend the corpus or the options and give --restart, or raise "
        "--max-bad-fraction."
    )


class _Watch:
    """Shows how far the workers are, and whether they are alive."""

    def __init__(self, board: Board, total: int, before: int) -> None:
        self.board = board
        self.before, self.total = before, round(total / MEGABYTE, 1)
        self.progress = Progress(self.total, round(before / MEGABYTE, 1), "MB")
        self.started = self.reported = time.monotonic()

    def show(self) -> None:
        """Move the bar, and report from time to time."""
        done = self.before + int(self.board.rows[:, 1].sum())
        self.progress.advance(min(round(done / MEGABYTE, 1), self.total))
        now = time.monotonic()
        if now - self.reported >= REPORT_SECONDS:
            self.reported = now
            tokens = int(self.board.rows[:, 2].sum()) / (now - self.started)
            self.progress.report(f"{tokens:,.0f} tokens/s  {self._alive()}")

    def _alive(self) -> str:
        rows: list[Any] = self.board.rows.tolist()
        busy = [(number, row) for number, row in enumerate(rows) if row[0]]
        words = [f"{len(busy)} of {len(rows)} workers busy"]
        for number, (unit, _, _, beat) in busy:
            silent = time.time() - beat
            if silent > SILENT_SECONDS:
                words.append(f"worker {number} silent for {silent:.0f} s in unit {unit - 1}")
        return ", ".join(words)

    def close(self) -> None:
        """Take the bar away."""
        self.progress.close()
