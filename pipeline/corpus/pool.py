"""The pool of worker processes that make the parts, and their progress on the terminal."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from queue import Empty, SimpleQueue
from typing import Any

from pipeline.base.errors import UserError
from pipeline.base.progress import MEGABYTE, REPORT_SECONDS, Progress
from pipeline.corpus import worker
from pipeline.corpus.partition import Partition
from pipeline.corpus.parts import check_bad
from pipeline.corpus.worker import Board, Job
from pipeline.data.facts import Counts

POLL_SECONDS = 0.5
SILENT_SECONDS = 60  # a worker without a heartbeat for so long is reported


class Pool:
    """Parts in the making.

    Attributes:
        made: counts of the parts finished so far.
    """

    def __init__(self, futures: dict[Future[Counts], int], poll: Callable[[Counts], None]) -> None:
        """Collect the results of `futures`, one per unit; call `poll` with `made` while waiting."""
        self.made = Counts()
        self._futures, self._poll = futures, poll
        self._missing = set(futures.values())
        self._ended: SimpleQueue[Future[Counts]] = SimpleQueue()
        for future in futures:
            future.add_done_callback(self._ended.put)

    def wait_for(self, unit: int) -> None:
        """Return once the part of a unit exists."""
        while True:
            with contextlib.suppress(Empty):
                future = self._ended.get(unit in self._missing, POLL_SECONDS)
                self._missing.remove(self._futures.pop(future))
                self.made = Counts.total([self.made, future.result()])
            self._poll(self.made)
            if unit not in self._missing:
                return


@contextlib.contextmanager
def making(
    job: Job, units: Sequence[int], todo: Sequence[int], workers: int, max_bad_fraction: float
) -> Iterator[Pool]:
    """Make the parts of `todo` in worker processes while the block runs.

    Args:
        job: of the run.
        units: all units of the run; those not in `todo` have a part.
        todo: the units to make.
        workers: processes, at most.
        max_bad_fraction: share of bad records above which waiting raises a `UserError`.

    Raises:
        UserError: if a worker dies; for an error in the corpus.
    """
    if not todo:
        yield Pool({}, lambda made: None)
        return
    workers = min(workers, len(todo))
    context = _context(job.partition)
    memory = Board.memory(context, workers)
    board = Board(memory, workers)
    arguments = (job, memory, workers, context.Value("i", 0))
    with ProcessPoolExecutor(workers, context, worker.start, arguments) as executor:
        futures = {executor.submit(worker.work, unit): unit for unit in todo}  # forks; no threads exist yet
        sizes = {unit: job.partition.size_of(unit) for unit in units}
        total, left = sum(sizes.values()), sum(sizes[unit] for unit in todo)
        try:
            with contextlib.closing(_Watch(board, total, total - left)) as watch:

                def poll(made: Counts) -> None:
                    watch.show()
                    check_bad(made, job.folder, units, max_bad_fraction, total, final=False)

                yield Pool(futures, poll)
        except BrokenProcessPool:
            raise UserError(
                "a worker died, perhaps out of memory: run the same command again, with fewer --workers if "
                "it happens again. Finished parts are kept."
            ) from None
        finally:
            board.stop()
            executor.shutdown(wait=True, cancel_futures=True)


def _context(partition: Partition) -> BaseContext:
    """Return how workers are started: forked, which is fast, if all inputs are text; spawned otherwise.

    A fork must not copy threads and connections, which pyarrow and `datasets` have open in the parent.
    """
    is_text = all(source.format in ("lines", "text") for source in partition.sources)
    return multiprocessing.get_context("fork" if is_text else "spawn")


class _Watch:
    """Shows how far the workers are, and which of them are silent."""

    def __init__(self, board: Board, total: int, before: int) -> None:
        """Start at `before` of `total` bytes."""
        self.board = board
        self.before, self.total = before, round(total / MEGABYTE, 1)
        self.progress = Progress(self.total, round(before / MEGABYTE, 1), "MB")
        self.started = self.reported = time.monotonic()

    def show(self) -> None:
        """Advance the bar; report every few seconds."""
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
        """Remove the bar."""
        self.progress.close()
