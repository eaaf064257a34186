"""Record training metrics: collect them on the device every step, reduce and write them once per interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from pipeline.chains.slots import SlotGroup
from pipeline.chains.statistics import ChainFigures
from pipeline.config import Config
from pipeline.engine.protocol import Engine
from pipeline.monitor.clock import Clock, Timed
from pipeline.monitor.stragglers import Stragglers
from pipeline.monitor.texts import ShownText
from pipeline.monitor.writers import JsonLines, Point, TensorBoard, WeightsAndBiases, Writer
from pipeline.objectives import stages_at
from pipeline.planning.documents import document_pairs
from pipeline.planning.flops import step_flops
from pipeline.planning.gpus import gpu_of_device

_GIB = 2**30


class Recorder:
    """Collects metrics on the device every step, and writes them once per interval."""

    def __init__(
        self,
        config: Config,
        vocabulary_rows: int,
        engine: Engine,
        groups: Sequence[SlotGroup],
        stragglers: Stragglers,
        first_step: int,
    ) -> None:
        """Open the files; see `open`.

        Args:
            config: configuration of the run.
            vocabulary_rows: rows of the output matrix, for the FLOPs.
            engine: training engine.
            groups: slot groups that provide the chain statistics.
            stragglers: comparison of the ranks.
            first_step: the next step.
        """
        self.config = config
        self.vocabulary_rows = vocabulary_rows
        self.within = document_pairs(config.data)
        self.engine = engine
        self.clock = Clock()
        self.groups = groups
        self.stragglers = stragglers
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []
        self.writers: list[Writer] = []
        self.failing: set[Writer] = set()
        self.lost_steps, self.last_sign = 0, 0.0  # of an earlier process, see `JsonLines`
        device = engine.ranks.device
        self.gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.open(first_step)

    def open(self, first_step: int) -> None:
        """Open the files, or reopen them after a rollback; entries from `first_step` on are dropped."""
        self.close()
        self.pending.clear()
        self.clock.restart()
        self.last_step = first_step - 1
        names: frozenset[str] = frozenset()
        if self.engine.ranks.is_first:
            run_dir = Path(self.config.run_dir)
            lines = JsonLines(run_dir, first_step)
            self.lost_steps, self.last_sign, names = lines.lost_steps, lines.last_sign, lines.last_names
            self.writers = [lines, TensorBoard(run_dir, first_step, self.config, lines.tags)]
            if self.config.monitor.wandb:
                self.writers.append(WeightsAndBiases(run_dir, self.config))
        self.written = self.engine.ranks.all_gather(names)[0]

    def collect(self, step: int, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Collect a step; `loss` [] is the mean over this rank's micro-batches, still on the device."""
        self.pending.append((step, loss, gradient_norm, learning_rate))
        self.clock.count()

    def flush(self, skipped: int, tokens: int) -> dict[str, float]:
        """Write the steps collected since the last flush, and return the metrics of the last one.

        Every rank must call this: it synchronises with the device and all-reduces one sum and one maximum.

        Args:
            skipped: steps skipped by the guard since the run began.
            tokens: seen by the weights up to the last step.
        """
        numbers, losses, norms, learning_rates = zip(*self.pending, strict=True)
        sums = self._sums(torch.stack(losses), numbers)
        gradient_norms = torch.stack(norms).tolist()
        timed = self.clock.take()
        ranks = self.engine.ranks
        chains = self.groups[0].statistics.figures(sums["chains"], len(numbers), ranks.sequence_size)
        interval = {
            **chains.scalars,
            "progress/tokens": tokens,
            **self._progress(numbers[-1], *sums["begun"]),
            **self._speed(numbers[-1], timed, chains),
            **self._memory(),
            "skipped_steps": skipped,
            **self.stragglers.figures(sums["ranks"]),
        }
        if timed.steps:
            wait = interval["ranks/data_wait_slowest"] * timed.steps
            interval["speed/data_wait_share"] = wait / timed.seconds
        if not math.isnan(sums["norm"][0]):
            interval["parameter_norm"] = math.sqrt(sums["norm"][0])
        last: dict[str, float] = {}
        for step, loss, norm, rate in zip(
            numbers, sums["losses"], gradient_norms, learning_rates, strict=True
        ):
            last = {"loss": loss / ranks.world_size, "gradient_norm": norm, "learning_rate": rate}
            if step == numbers[-1]:
                last |= interval
                self._write(Point(step, last, chains.bins, chains.histograms))
            else:
                self._write(Point(step, last))
        self.pending.clear()
        return last

    def _sums(self, losses: Tensor, steps: Sequence[int]) -> dict[str, list[float]]:
        """Sum over groups and ranks, with one reduction and one device synchronisation."""
        begun = np.sum([group.begun(steps[-1]) for group in self.groups], axis=0)
        parts = {
            "losses": losses.double(),
            "chains": torch.stack([group.statistics.take() for group in self.groups]).sum(dim=0),
            "ranks": self.stragglers.measure(len(steps)),
            "norm": self.engine.squared_norm().reshape(1),
            "begun": torch.from_numpy(begun / self.engine.ranks.sequence_size).to(losses.device),
        }
        total = self.engine.ranks.sum(torch.cat(list(parts.values())))
        sizes = [len(part) for part in parts.values()]
        return {name: part.tolist() for name, part in zip(parts, total.cpu().split(sizes), strict=True)}

    def _progress(self, step: int, begun: float, begun_in_first_epoch: float) -> dict[str, float]:
        """Return the progress of the run at `step`."""
        stream = self.groups[0].stream
        phase = stream.phase_at(step)
        figures = {
            "progress/epochs": begun / stream.phases[phase].size,
            "progress/unique_samples": begun_in_first_epoch,
        }
        if len(stream.phases) > 1:
            figures["progress/phase"] = phase
        if self.config.train.batch_ramp:
            figures["progress/global_batch"] = self.config.train.batch_at(step)
        stages = stages_at(self.config.objective, step)
        return figures if stages is None else figures | {"chains/stages": stages}

    def _speed(self, step: int, timed: Timed, chains: ChainFigures) -> dict[str, float]:
        """Return rates over the timed steps up to `step`, all of one batch; no rates if none was timed."""
        examples = self.config.train.batch_at(step)
        rows, prompt = chains.masked_rows, chains.prompt_length
        flops = step_flops(self.config, self.vocabulary_rows, rows, step, prompt, self.within).model
        figures = {"progress/flops_per_step": flops, "time/training": timed.seconds}
        communication = self.engine.take_communication_share()
        if communication is not None:
            figures["speed/communication_share"] = communication
        if not timed.steps:
            return figures
        rate = timed.steps / timed.seconds
        of_rank = flops * rate / self.engine.ranks.world_size
        figures |= {
            "samples_per_second": rate * examples,
            "tokens_per_second": rate * examples * self.config.data.sequence_length,
            "speed/tflops": of_rank / 1e12,
        }
        if self.gpu is not None:
            figures["speed/mfu"] = of_rank / self.gpu.flops
        return figures

    def _memory(self) -> dict[str, float]:
        """Return the maximum over ranks in GiB: peak GPU memory since the last call, or host memory now."""
        device = self.engine.ranks.device
        if device.type == "cuda":
            names = ["memory/allocated", "memory/reserved"]
            mine = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
            torch.cuda.reset_peak_memory_stats(device)
        else:
            names, mine = ["memory/host"], [psutil.Process().memory_info().rss]
        sizes = torch.tensor(mine, dtype=torch.float64, device=device) / _GIB
        return dict(zip(names, self.engine.ranks.max(sizes).tolist(), strict=True))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics of a step; only the first rank writes."""
        self._write(Point(step, values))

    def written_at(self, step: int) -> frozenset[str]:
        """Return, on every rank, the names of the metrics that an earlier process wrote at `step`."""
        return self.written if step == self.last_step else frozenset()

    def _write(self, point: Point) -> None:
        self._by_each(lambda writer: writer.write(point))

    def write_texts(self, texts: Sequence[ShownText]) -> None:
        """Write the texts generated at one step; only the first rank writes."""
        if texts:
            self._by_each(lambda writer: writer.write_texts(texts))

    def _by_each(self, act: Callable[[Writer], None]) -> None:
        """Call `act` on each writer; if its disk is full, the metrics are lost and training continues."""
        for writer in self.writers:
            try:
                act(writer)
                self.failing.discard(writer)
            except OSError as error:
                if writer not in self.failing:
                    what = error.filename or type(writer).__name__
                    print(
                        f"{what} cannot be written: {error.strerror}. Training continues without it.",
                        flush=True,
                    )
                self.failing.add(writer)

    @contextmanager
    def apart(self, step: int, what: str) -> Iterator[None]:
        """Exclude the block from the rates, and write its duration in seconds as time/`what`."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.clock.leave_out(seconds)
        self.write(step, {f"time/{what}": seconds})

    def sync(self) -> None:
        """Flush all writers to disk, before a checkpoint relies on it."""
        self._by_each(lambda writer: writer.sync())

    def close(self) -> None:
        """Close all writers."""
        self._by_each(lambda writer: writer.close())
