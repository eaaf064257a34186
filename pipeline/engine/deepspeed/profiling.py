"""DeepSpeed's measurements of single steps: FLOPs by module, and time in collectives."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import deepspeed.comm
import torch.nn.functional as F
from deepspeed.profiling.flops_profiler import FlopsProfiler
from deepspeed.utils.timer import SynchronizedWallClockTimer

from pipeline.config import Config
from pipeline.engine.deepspeed.private import (
    counting_any_product,
    log_collectives,
    seconds_in_collectives,
    time_collectives_with,
)

FLOPS_FILE = "flops_profile.txt"
COMMUNICATION_FILE = "communication.txt"


class _Timers(SynchronizedWallClockTimer):
    """Timers that forget earlier measurements at each start.

    The communication log of DeepSpeed 0.19.8 never resets its timers, and would record for each collective
    the sum of all before.
    """

    class Timer(SynchronizedWallClockTimer.Timer):
        """One timer."""

        def start(self) -> None:
            """Forget earlier measurements, and start."""
            self.event_timers.clear()
            super().start()


class Profiler:
    """Measures the steps that the configuration names; other steps cost nothing.

    DeepSpeed's own switches (flops_profiler and comms_logger in its JSON) would wait for the device at every
    step, and keep the time of every collective in memory.
    """

    def __init__(self, config: Config, engine: deepspeed.DeepSpeedEngine) -> None:
        """Start to time collectives, if ``profiling.communication_steps`` is set."""
        self.config = config.profiling
        self.folder = Path(config.run_dir)
        self.engine = engine
        self.first_rank = deepspeed.comm.get_rank() == 0
        self.step = 1  # the current one, from 1
        self.forwards = 0  # of the current step
        self.began = 0.0
        self.communication_share: float | None = None
        if self.config.communication_steps:
            time_collectives_with(_Timers())
            deepspeed.comm.configure(enabled=True, prof_all=True)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Measure the forward inside, if it is the first of step ``profiling.flops_step``."""
        self.forwards += 1
        if self.step == self.forwards == 1:
            self.began = time.perf_counter()
        if self.step != self.config.flops_step or self.forwards > 1 or not self.first_rank:
            yield
            return
        profiler = FlopsProfiler(self.engine.module, self.engine)
        linear = F.linear
        with counting_any_product():
            profiler.start_profile()  # wraps torch's functions, and what counts them
        if linear.__module__.startswith("deepspeed"):  # patched by zero.Init; its matmul is counted already
            F.linear = linear
        yield
        profiler.stop_profile()
        profiler.print_model_profile(self.step, top_modules=3, output_file=str(self.folder / FLOPS_FILE))
        profiler.end_profile()

    def end_step(self) -> None:
        """Count a step; write the table of collectives after the last step that timed them."""
        if self.step == self.config.communication_steps:
            deepspeed.comm.configure(enabled=False)
            self.communication_share = seconds_in_collectives() / (time.perf_counter() - self.began)
            if self.first_rank:
                path = self.folder / COMMUNICATION_FILE
                with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                    log_collectives()
            deepspeed.comm.reset_log()
        self.step += 1
        self.forwards = 0
