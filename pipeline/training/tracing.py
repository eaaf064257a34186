"""Profiles for viewers: a trace of chosen steps, and a snapshot of the GPU memory that did not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.base.errors import UserError
from pipeline.base.traced import trace
from pipeline.config import Config
from pipeline.monitor.clock import Clock
from pipeline.ranks import Ranks
from pipeline.training.state import TrainState

FOLDER = "traces"
ALLOCATIONS = 100_000  # the newest ones and their stacks are kept for a snapshot


class Tracer:
    """Writes a Chrome trace of the steps of ``profiling.trace_steps``, each rank its own.

    The step before warms the profiler up. From then on until the file is written, no throughput is measured.
    """

    def __init__(self, config: Config, ranks: Ranks, state: TrainState, clock: Clock) -> None:
        """Begin, if the warm-up is the first step of the program."""
        self.steps = config.profiling.trace_steps
        self.folder = Path(config.run_dir) / FOLDER
        self.ranks = ranks
        self.state = state
        self.clock = clock
        self.done = 0  # steps since the start of the program
        self.profiler: profile | None = None
        self._begin_if_due()

    def after_step(self) -> None:
        """Begin, continue or end the trace after a step; every rank calls this."""
        self.done += 1
        if self.profiler is not None:
            self.profiler.step()  # writes after the last step
            if self.steps is not None and self.done == self.steps[1]:
                self.close()
                self.ranks.barrier()  # the slowest disk is no training either
                self.clock.resume()
        self._begin_if_due()

    def _begin_if_due(self) -> None:
        if self.steps is None or self.done != self.steps[0] - 2:
            return
        on_gpu = self.ranks.device.type == "cuda"
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            schedule=schedule(wait=0, warmup=1, active=self.steps[1] - self.steps[0] + 1, repeat=1),
            on_trace_ready=self._write,
        )
        first = self.state.step + 2
        self.path = self.folder / f"rank_{self.ranks.rank:05d}.{first}.pt.trace.json.gz"
        self.clock.pause()
        self.profiler.start()
        trace(True)

    def _write(self, profiler: profile) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        except OSError as error:
            print(f"{self.path} cannot be written: {error.strerror}. Training continues.", flush=True)

    def close(self) -> None:
        """End the trace; one that is cut short is written as far as it came."""
        if self.profiler is not None:
            trace(False)
            self.profiler.stop()
            self.profiler = None


@contextmanager
def memory_snapshots(config: Config, ranks: Ranks) -> Iterator[None]:
    """Write a snapshot of the GPU's memory when it runs out inside the block; ``profiling.memory_snapshot``.

    Raises:
        UserError: for a rank without a GPU.
    """
    if not config.profiling.memory_snapshot:
        yield
        return
    if ranks.device.type != "cuda":
        raise UserError(
            "profiling.memory_snapshot is true, but this rank has no GPU: only the memory of a GPU has "
            "snapshots. Leave it out."
        )
    torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS, stacks="python")
    try:
        yield
    except torch.OutOfMemoryError:  # what its frames hold is still in memory
        path = Path(config.run_dir) / FOLDER / f"rank_{ranks.rank:05d}.memory.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        print(f"out of memory: the blocks and who allocated them are in {path}", flush=True)
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
