"""The parts of real ZeRO-3 steps on 1, 2 and 4 CPU ranks beside what the plan says of them.

usage: python -m benchmarks.plan_step [--ranks 1 2 4] [--output benchmarks/results/plan_step.json]

What a GPU's data sheet says is measured here first, with all ranks at once: the rate of matrix products, the
bytes a second of gloo's collectives, those of adding vectors. The efficiency is that of one rank, so its own
computation agrees by construction; what the plan says of more ranks is a forecast. Weak scaling: each rank
has as many sequences as the one had. The plan's formulas are those of tools/plan_run.py.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.random_text import engine_on_random_text
from benchmarks.ranks import start_ranks
from pipeline import config as configuration
from pipeline.base.cli import ToolParser, run
from pipeline.config import Config
from pipeline.engine.build import engine_settings
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.gpus import GIB, Gpu
from pipeline.planning.memory import Zero
from pipeline.planning.run_plan import Planner

TOKENS = 4000
SEQUENCES = 8  # of a rank and step
STEPS = 6  # with timed collectives; as many again without
PARTS = ("computation", "communication", "update", "step")
SETTINGS = f"""
    --run_dir unused --data.prefixes [unused] --data.sequence_length 128 --train.micro_batch_size {SEQUENCES}
    --model.layers 6 --model.hidden_size 384 --model.heads 6 --model.intermediate_size 1024
    --schedule.warmup_steps 1 --train.steps 100 --engine.device cpu --profiling.communication_steps {STEPS}
""".split()
ZERO = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 2000}


def load(folder: Path, ranks: int) -> Config:
    """Return the configuration, with its DeepSpeed JSON written into `folder`."""
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": ZERO}))
    more = ["--run_dir", str(folder), "--engine.deepspeed_config", str(path)]
    return configuration.load([*SETTINGS, *more, "--train.global_batch_size", str(SEQUENCES * ranks)])


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


def measure(ranks: int, output: Path) -> None:
    """Train on this rank and, on the first, write what was measured: means over the ranks."""
    own = output.parent / os.environ["RANK"]
    with engine_on_random_text(load(own, ranks), TOKENS, 128) as (engine, groups):
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
        if engine.ranks.is_first:
            output.write_text(json.dumps({key: sum(f[key] for f in found) / ranks for key in figures}))


def measured(ranks: int, folder: Path) -> dict[str, float]:
    """Start the ranks, and return what they found."""
    output = folder / "measured.json"
    for rank in range(ranks):
        (folder / str(rank)).mkdir(exist_ok=True)
    arguments = [__spec__.name, "--measure", str(ranks), "--output", str(output)]
    start_ranks(f"{ranks} ranks", ranks, arguments)
    found: dict[str, float] = json.loads(output.read_text())
    return found


def planned(ranks: int, folder: Path, found: dict[str, float], efficiency: float) -> dict[str, float]:
    """Return the seconds that the plan gives a step on the machine that `found` describes."""
    config = load(folder / "0", ranks)
    machine = Gpu(
        found["flops"], 100 * GIB, int(found["memory"]), found["link"], found["link"], ranks, ("this CPU",)
    )
    assumed = Assumptions(
        efficiency=efficiency,
        host_milliseconds=0,
        link_share=1,
        overlap=0,
        masked_share=found["rows"] / (SEQUENCES * config.data.sequence_length),
    )
    zero = Zero.of(engine_settings(config))
    return Planner(config, zero, TOKENS, machine, assumed).plan(ranks).seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measured and the planned seconds of each part; the ranks call this too."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="world sizes, 1 first")
    parser.add_argument("--measure", type=int, help="called on the ranks")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.measure:
        measure(options.measure, options.output)
        return
    efficiency, results = 1.0, {}
    print("| ranks | " + " | ".join(f"{part}, s (plan)" for part in PARTS) + " | plan / step |")
    print("|---" * (len(PARTS) + 2) + "|")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            found = measured(ranks, folder)
            plan = planned(ranks, folder, found, efficiency)
            if ranks == 1:
                efficiency = plan["computation"] / found["computation"]
                plan = planned(ranks, folder, found, efficiency)
        cells = " | ".join(f"{found[part]:.3f} ({plan[part]:.3f})" for part in PARTS)
        print(f"| {ranks} | {cells} | {plan['step'] / found['step']:.2f} |", flush=True)
        results[ranks] = {"measured": found, "planned": plan, "efficiency": efficiency}
    if options.output:
        content = {"torch": torch.__version__, "cores": os.cpu_count(), "ranks": results}
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, of_ranks=True)
