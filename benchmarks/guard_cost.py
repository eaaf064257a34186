"""What the guard and the moving average cost: the same ZeRO-3 steps with and without them, in turns.

usage: torchrun --standalone --nproc_per_node 2 -m benchmarks.guard_cost [--section.key value ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median

from benchmarks.random_text import engine_on_random_text
from pipeline import config as configuration
from pipeline.base.cli import run
from pipeline.chains.slots import SlotGroup
from pipeline.config import Config
from pipeline.engine.protocol import Engine
from pipeline.resilience.guard import Guard
from pipeline.train import train_step

WARM_UP, ROUNDS, TOKENS = 5, 80, 4000
SETTINGS = """
    --run_dir unused --data.prefixes [unused] --optimizer.ema_decay 0.9999 --train.global_batch_size 16
    --train.micro_batch_size 8 --data.sequence_length 128 --model.layers 4 --model.hidden_size 192
    --model.heads 6 --model.intermediate_size 512
""".split()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the median time of a step in each way, and the ratios."""
    config = configuration.load([*SETTINGS, *(sys.argv[1:] if arguments is None else arguments)])
    with engine_on_random_text(config, TOKENS) as (engine, groups):
        measure(config, engine, groups)


def measure(config: Config, engine: Engine, groups: list[SlotGroup]) -> None:
    """Run the steps and report."""
    ranks = engine.ranks
    average, guard = engine.average, Guard(config.guard, config.optimizer.gradient_clip)  # type: ignore[attr-defined]
    ways = {"neither": (None, None), "guard": (guard, None), "average": (None, average)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    step = 0
    for number in range(WARM_UP + ROUNDS):
        for name, (judge, kept) in ways.items():
            step += 1
            engine.average = kept  # type: ignore[attr-defined]
            ranks.barrier()
            began = time.perf_counter()
            _, norm = train_step(engine, groups, 1e-4, step, judge)
            float(norm)
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - began)
    if ranks.is_first:
        print(f"{ranks.world_size} ranks on {ranks.device.type}, {ROUNDS} steps each way")
        for name, values in times.items():
            ratio = median(values) / median(times["neither"])
            print(f"{name:8} {1e3 * median(values):8.2f} ms a step   x {ratio:.4f}")


if __name__ == "__main__":
    run(main)
