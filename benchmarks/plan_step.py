"""The parts of real ZeRO-3 steps on 1, 2 and 4 CPU ranks beside what the plan says of them.

usage: python -m benchmarks.plan_step [--ranks 1 2 4] [--output benchmarks/results/plan_step.json]

What a GPU's data sheet says is measured here first, with all ranks at once: the rate of matrix products, the
bytes a second of gloo's collectives, those of adding vectors. The efficiency is that of one rank, so its own
computation agrees by construction; what the plan says of more ranks is a forecast. Weak scaling: each rank
has as many sequences as the one had. The plan's formulas are those of tools/plan_run.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from statistics import median
from typing import Any

import torch

from benchmarks.figures import add_output, write_figures
from benchmarks.random_text import config_with, engine_on_random_text
from benchmarks.ranks import on_ranks
from pipeline.base.cli import ToolParser, run
from pipeline.config import Config
from pipeline.engine.build import engine_settings
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.gpus import GIB, Gpu
from pipeline.planning.memory import Zero
from pipeline.planning.run_plan import Planner

TOKENS = 4000
SEQUENCES, LENGTH = 8, 128  # of a rank and step
STEPS = 6  # with timed collectives; as many again without
PARTS = ("computation", "communication", "update", "step")
SETTINGS = f"""
    --data.sequence_length {LENGTH} --train.micro_batch_size {SEQUENCES}
    --model.layers 6 --model.hidden_size 384 --model.heads 6 --model.intermediate_size 1024
    --schedule.warmup_steps 1 --train.steps 100 --engine.device cpu --profiling.communication_steps {STEPS}
""".split()
ZERO = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 2000}


def config_of(ranks: int) -> AbstractContextManager[Config]:
    """Give the configuration of so many ranks."""
    batch = ["--train.global_batch_size", str(SEQUENCES * ranks)]
    return config_with({"zero_optimization": ZERO}, [*SETTINGS, *batch])


def seconds_of(action: Callable[[], Any], times: int = 7) -> float:
    """Return the median time of an action, after one that is not counted."""
    action()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return median(taken)


def calibrate(ranks: int) -> dict[str, float]:
    """Return this rank's FLOP/s of products, bytes/s of adding vectors, and bytes/s through a ring."""
    left, right = torch.rand(1024, 1024), torch.rand(1024, 1024)
    flops = 2 * 1024**3 / seconds_of(lambda: left @ right)
    one, other = torch.rand(4 * 1024**2), torch.rand(4 * 1024**2)
    memory = 3 * one.nbytes / seconds_of(lambda: one.add_(other))
    if ranks == 1:
        return {"flops": flops, "memory": memory, "link": 1.0}
    whole, part = torch.rand(1024**2), torch.rand(1024**2 // ranks)
    gather = seconds_of(lambda: torch.distributed.all_gather_into_tensor(whole, part))
    scatter = seconds_of(lambda: torch.distributed.reduce_scatter_tensor(part, whole))
    return {
        "flops": flops,
        "memory": memory,
        "link": 2 * whole.nbytes * (ranks - 1) / ranks / (gather + scatter),
    }


def measure(ranks: int) -> dict[str, float]:
    """Train on this rank; return what was measured: means over the ranks."""
    with ExitStack() as stack:
        config = stack.enter_context(config_of(ranks))
        engine, groups = stack.enter_context(engine_on_random_text(config, TOKENS))
        calibrated = calibrate(ranks)
        steps: list[float] = []
        updates: list[float] = []
        share = 0.0
        for number in range(1, 2 * STEPS + 1):
            began = time.perf_counter()
            for group in groups:
                batch = group.inputs(number)
                result = engine.forward(batch)
                group.advance(batch, result, number)
                engine.backward(result.loss)
            before = time.perf_counter()
            engine.step(1e-4)
            share = engine.take_communication_share() or share
            if number > STEPS:
                updates.append(time.perf_counter() - before)
                steps.append(time.perf_counter() - began)
        rows = sum(int(group.state.masked.sum()) for group in groups)
        step, update = median(steps), median(updates)
        communication = share * step
        figures = calibrated | {
            "rows": rows,
            "step": step,
            "communication": communication,
            "update": update,
            "computation": step - communication - update,
        }
        found = engine.ranks.all_gather(figures)
        return {key: sum(each[key] for each in found) / ranks for key in figures}


def planned(ranks: int, found: dict[str, float], efficiency: float) -> dict[str, float]:
    """Return the seconds that the plan gives a step on the machine that `found` describes."""
    machine = Gpu(
        found["flops"], 100 * GIB, int(found["memory"]), found["link"], found["link"], ranks, ("this CPU",)
    )
    assumed = Assumptions(
        efficiency=efficiency,
        host_milliseconds=0,
        link_share=1,
        overlap=0,
        masked_share=found["rows"] / (SEQUENCES * LENGTH),
    )
    with config_of(ranks) as config:
        zero = Zero.of(engine_settings(config))
    return Planner(config, zero, TOKENS, machine, assumed).plan(ranks).seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measured and the planned seconds of each part."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="world sizes, 1 first")
    add_output(parser)
    options = parser.parse_args(arguments)
    efficiency, results = 1.0, {}
    print("| ranks | " + " | ".join(f"{part}, s (plan)" for part in PARTS) + " | plan / step |")
    print("|---" * (len(PARTS) + 2) + "|")
    for ranks in options.ranks:
        found = on_ranks(ranks, measure, ranks)
        plan = planned(ranks, found, efficiency)
        if ranks == 1:
            efficiency = plan["computation"] / found["computation"]
            plan = planned(ranks, found, efficiency)
        cells = " | ".join(f"{found[part]:.3f} ({plan[part]:.3f})" for part in PARTS)
        print(f"| {ranks} | {cells} | {plan['step'] / found['step']:.2f} |", flush=True)
        results[ranks] = {"measured": found, "planned": plan, "efficiency": efficiency}
    content = {"torch": torch.__version__, "cores": os.cpu_count(), "ranks": results}
    write_figures(options.output, content)


if __name__ == "__main__":
    run(main)
