"""Curves: TensorBoard events and metrics.jsonl, written by the first rank."""

from __future__ import annotations

import time
from pathlib import Path

import orjson
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipeline.files import keep_lines
from pipeline.monitor.stragglers import Stragglers
from pipeline.runtime import Engine
from pipeline.slots import SlotGroup

METRICS_FILE = "metrics.jsonl"


class Recorder:
    """Collects values on the device every step, and fetches and writes them once an interval."""

    def __init__(
        self, run_dir: Path, engine: Engine, groups: list[SlotGroup], stragglers: Stragglers, first_step: int
    ) -> None:
        """Open the files; what an interrupted run wrote from `first_step` on is dropped.

        Args:
            run_dir: folder of the run.
            engine: what the steps run on.
            groups: where the chains' statistics come from.
            stragglers: what compares the ranks.
            first_step: the step that comes next.
        """
        self.engine = engine
        self.groups = groups
        self.stragglers = stragglers
        self.pending: list[tuple[int, Tensor, Tensor | float, float]] = []
        self.since = time.monotonic()
        self.writer: SummaryWriter | None = None
        self.path = run_dir / METRICS_FILE
        if engine.launch.rank == 0:
            keep_lines(self.path, lambda line: orjson.loads(line)["step"] < first_step)
            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def collect(self, step: int, loss: Tensor, gradient_norm: Tensor | float, learning_rate: float) -> None:
        """Remember a step; `loss` [] is this rank's mean over its micro-batches, still on the device."""
        self.pending.append((step, loss, gradient_norm, learning_rate))

    def flush(self, samples: int, tokens: int, skipped: int) -> dict[str, float]:
        """Write the steps collected since the last flush, and return the figures of the interval.

        Every rank calls this: it waits for the device once, and reduces once.

        Args:
            samples: sequences of a step, over all ranks.
            tokens: tokens of a step, over all ranks.
            skipped: steps that the guard has refused since the run began.
        """
        steps = len(self.pending)
        losses = torch.stack([loss for _, loss, _, _ in self.pending]).double()
        chains = torch.stack([group.statistics for group in self.groups]).sum(dim=0)
        world_size = self.engine.launch.world_size
        ranks = self.stragglers.measure(steps)
        total = self.engine.sum_over_ranks(torch.cat([losses, chains, ranks])).tolist()
        for group in self.groups:
            group.statistics.zero_()
        rate = steps / (time.monotonic() - self.since)
        self.since = time.monotonic()
        (masked, stage, ended), measured = total[steps : steps + 3], total[steps + 3 :]
        batches = steps * len(self.groups) * world_size
        interval = {
            "masked_fraction": masked / batches,
            "mean_stage": stage / batches,
            "chains_ended_per_step": ended / steps / self.engine.launch.sequence_size,
            "samples_per_second": rate * samples,
            "tokens_per_second": rate * tokens,
            "skipped_steps": skipped,
            **self.stragglers.figures(measured),
        }
        last: dict[str, float] = {}
        for (step, _, norm, rate_now), loss in zip(self.pending, total, strict=False):
            last = {"loss": loss / world_size, "gradient_norm": float(norm), "learning_rate": rate_now}
            if step == self.pending[-1][0]:
                last |= interval
            self.write(step, last)
        self.pending.clear()
        return last

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write values of a step under their names."""
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}" if "/" not in name else name, value, step)
        with self.path.open("ab") as file:
            file.write(orjson.dumps({"step": step, **values}) + b"\n")

    def sync(self) -> None:
        """See to it that all that was flushed is in the files, before a checkpoint says that it is."""
        if self.writer is not None:
            self.writer.flush()

    def restart_clock(self) -> None:
        """Leave out of the rates what has passed since the last flush (evaluation, saving)."""
        self.since = time.monotonic()

    def close(self) -> None:
        """Write what is buffered."""
        if self.writer is not None:
            self.writer.close()
