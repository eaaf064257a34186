"""Step time, MFU and peak memory of a configured run on random text, beside what the plan says of them.

usage: python -m benchmarks.gpu_proof.training --output FILE.json -- --config X.yaml [--section.key value ...]

The steps are those of pipeline.train, with its guard; tokens are random, so nothing is read from disk. Each
rank has one micro-batch a step. On CPUs memory is that of live tensors.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_proof.measuring import wait, write
from benchmarks.gpu_proof.peak import at_peak
from benchmarks.random_text import engine_on_random_text
from pipeline import config as configuration
from pipeline.base.cli import ToolParser, run
from pipeline.chains.slots import SlotGroup
from pipeline.config import Config
from pipeline.engine.build import engine_settings
from pipeline.engine.protocol import Engine
from pipeline.planning.flops import step_flops
from pipeline.planning.gpus import Gpu, gpu_of_device
from pipeline.planning.live_memory import LiveStorages
from pipeline.planning.memory import Zero, count_parameters, plan_memory
from pipeline.planning.run_plan import Assumptions, Planner
from pipeline.ranks import join_launch
from pipeline.resilience.guard import Guard
from pipeline.train import train_step

RATE = 1e-4
BLOCK = 5  # steps between two looks at the clock
UPDATES = 3  # that are timed by themselves
TRACED = 2  # steps in the profile
LONGEST = 12  # kernels, operations of the host and allocations that are named


class Run:
    """A run that is measured, on this rank.

    Attributes:
        rows: masked rows [] of each micro-batch, in the order of the steps.
    """

    def __init__(self, config: Config, engine: Engine, groups: Sequence[SlotGroup]) -> None:
        self.config, self.engine, self.groups = config, engine, groups
        self.device = engine.ranks.device
        self.guard = Guard(config.guard, config.optimizer.gradient_clip)
        self.rows: list[torch.Tensor] = []
        self.done = 0

    def steps(self, count: int) -> float:
        """Train so many steps; return the seconds of one."""
        began = wait(self.device)
        for _ in range(count):
            self.done += 1
            self.rows += [group.state.masked.sum() for group in self.groups]
            train_step(self.engine, self.groups, RATE, self.done, self.guard)
        return (wait(self.device) - began) / count

    def update(self) -> float:
        """Train a step; return the seconds of its update, by a clock that waits before and after."""
        taken = []
        step = self.engine.step

        def timed(rate: float, accept: Callable[[torch.Tensor], bool] | None = None) -> torch.Tensor:
            began = wait(self.device)
            norm = step(rate, accept)
            taken.append(wait(self.device) - began)
            return norm

        self.engine.step = timed  # type: ignore[method-assign]
        self.steps(1)
        self.engine.step = step  # type: ignore[method-assign]
        return taken[0]

    def trace(self) -> dict[str, Any]:
        """Profile a few steps; return launches, how long the device was busy, and what takes longest."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as record:
            seconds = self.steps(TRACED)
        events = record.key_averages()
        on_host = seconds_of(events, "self_cpu_time_total")
        # Annotations span the kernels inside them, and would count them twice.
        kernels = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
        on_device = seconds_of(kernels, "self_device_time_total") if on_gpu else on_host
        return {
            "step_seconds": seconds,
            "device_seconds": sum(on_device.values()),
            "launches": sum(e.count for e in events if "LaunchKernel" in e.key) / TRACED,
            "longest": dict(list(on_device.items())[:LONGEST]),
            "longest_on_host": dict(list(on_host.items())[:LONGEST]),
        }


def seconds_of(events: Iterable[Any], attribute: str) -> dict[str, float]:
    """Return the seconds of a step by name, the longest first; `attribute` holds microseconds."""
    found: Counter[str] = Counter()
    for event in events:  # names of kernels that begin alike are added up
        found[event.key[:100]] += getattr(event, attribute) / 1e6 / TRACED
    return dict(found.most_common())


def memory_of(run: Run, live: LiveStorages | None) -> dict[str, float]:
    """Return the peak bytes of this rank since the last reset, beside the plan's; and what torch has not."""
    config, ranks = run.config, run.engine.ranks
    card = None if live is not None else torch.cuda.mem_get_info(run.device)[1]
    zero = Zero.of(engine_settings(config))
    parameters = count_parameters(config, vocabulary_of(config))
    plan = plan_memory(config, zero, parameters, ranks.world_size, int(max(run.rows)), card)
    found: dict[str, float] = {"planned": plan.total, "host_planned": plan.host}
    if live is not None:  # parts that are offloaded are in the same memory here
        return found | {"allocated": live.peak, "planned / allocated": (plan.total + plan.host) / live.peak}
    free, total = torch.cuda.mem_get_info(run.device)
    allocated = torch.cuda.max_memory_allocated(run.device)
    return found | {
        "allocated": allocated,
        "planned / allocated": plan.total / allocated,
        "reserved": torch.cuda.max_memory_reserved(run.device),
        "beside_torch": total - free - torch.cuda.memory_reserved(run.device),
        "card": total,
    }


def vocabulary_of(config: Config) -> int:
    """Return the tokens of the random text."""
    assert config.model.vocab_size is not None
    return config.model.vocab_size


def speed_of(run: Run, blocks: Sequence[float], updates: Sequence[float], world_size: int) -> dict[str, Any]:
    """Return times and rates of a step, and what they are made of."""
    config = run.config
    rows = float(torch.stack(run.rows).double().mean()) * world_size * len(run.groups)
    tokens = config.train.global_batch_size * config.data.sequence_length
    step, flops = median(blocks), step_flops(config, vocabulary_of(config), rows)
    gpu = gpu_of_device(torch.cuda.get_device_name(run.device)) if run.device.type == "cuda" else None
    return {
        "step_seconds": step,
        "update_seconds": median(updates),
        "blocks_of_steps": list(blocks),
        "tokens_per_second": tokens / step,
        "masked_share": rows / tokens,
        "flops": flops.model,
        "executed_flops": flops.executed,
        "mfu": None if gpu is None else flops.model / step / world_size / gpu.flops,
        "planned_step_seconds": None if gpu is None else planned_step(config, gpu, world_size, rows / tokens),
    }


def planned_step(config: Config, gpu: Gpu, world_size: int, masked_share: float) -> float:
    """Return the seconds of a step that a plan gives without any measurement but that of the mask ratio."""
    assumed = Assumptions(masked_share=masked_share)
    zero = Zero.of(engine_settings(config))
    return Planner(config, zero, vocabulary_of(config), gpu, assumed).plan(world_size).seconds["step"]


def measure(config: Config, warm_up: int, steps: int, path: Path) -> None:
    """Train, and write what was measured; the profiles come last, since they may fail by themselves."""
    began = time.monotonic()
    with ExitStack() as stack:
        live = None if torch.cuda.is_available() else stack.enter_context(LiveStorages())
        running = engine_on_random_text(config, vocabulary_of(config))
        run = Run(config, *stack.enter_context(running))
        ranks = run.engine.ranks
        started = time.monotonic()
        run.steps(warm_up)
        warm = time.monotonic()
        run.rows.clear()
        if live is not None:
            live.peak = live.now
        else:
            torch.cuda.reset_peak_memory_stats(run.device)
        blocks = [run.steps(min(BLOCK, steps)) for _ in range(max(1, steps // BLOCK))]
        figures = {
            "parameters": count_parameters(config, vocabulary_of(config)).count,
            "gpu": torch.cuda.get_device_name(run.device) if live is None else "cpu",
            "ranks": ranks.world_size,
            "zero": asdict(Zero.of(engine_settings(config))),
            "compiled": config.engine.compile,
            "objective": config.objective.kind,
            "layers": config.model.layers,
            "micro_batch": config.train.micro_batch_size,
            "length": config.data.sequence_length,
            "start_seconds": started - began,
            "warm_up_seconds": warm - started,
            "memory": memory_of(run, live),
        }
        figures |= speed_of(run, blocks, [run.update() for _ in range(UPDATES)], ranks.world_size)
        if ranks.is_first:
            write(path, figures)
        figures["trace"] = run.trace()
        if live is None:
            figures["memory"]["at_peak"] = dict(list(at_peak(lambda: run.steps(1)).items())[:LONGEST])
        if ranks.is_first:
            path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the run that the settings describe, with one micro-batch a rank and step."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not measured")
    parser.add_argument("--steps", type=int, default=30, help="steps that are measured")
    parser.add_argument("settings", nargs="*", help="of pipeline.train, after --")
    options = parser.parse_args(arguments)
    config = configuration.load(["--run_dir", "unused", *options.settings])
    batch = config.train.micro_batch_size * join_launch()[1]
    config = replace(config, train=replace(config.train, global_batch_size=batch))
    measure(config, options.warmup, options.steps, options.output)


if __name__ == "__main__":
    run(main, of_ranks=True)
