"""What the guard and the moving average cost: the same ZeRO-3 steps with and without them, in turns.

usage: torchrun --standalone --nproc_per_node 2 benchmarks/guard_cost.py [--section.key value ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from pipeline import config as configuration
from pipeline import objectives
from pipeline.cli import run
from pipeline.data.batch import ANSWER, Array
from pipeline.data.streams import SlotStream
from pipeline.model.batch import Vocabulary
from pipeline.resilience.guard import Guard
from pipeline.runtime import build_engine, read_launch
from pipeline.slots import SlotGroup, slots_of_rank
from pipeline.train import train_step

ROUNDS, STEPS, LENGTH, TOKENS, MASK = 8, 10, 128, 4000, 3
SETTINGS = """
    --run_dir unused --data.prefixes [unused] --optimizer.ema_decay 0.9999 --train.global_batch_size 16
    --train.micro_batch_size 8 --model.layers 4 --model.hidden_size 192 --model.heads 6
    --model.intermediate_size 512
""".split()


class RandomText:
    """1,000 sequences of random tokens."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, Array]:
        tokens = np.random.default_rng(index).integers(4, TOKENS, LENGTH)
        return {"tokens": tokens, "roles": np.full(LENGTH, ANSWER, np.int8)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the median time of a step in each way, and the ratios."""
    config = configuration.load([*SETTINGS, *(sys.argv[1:] if arguments is None else arguments)])
    launch = read_launch(config)
    engine = build_engine(config, launch, Vocabulary(TOKENS, TOKENS, MASK))
    stream = SlotStream(RandomText(), config.train.global_batch_size, config.train.seed, workers=1)
    accumulation = config.train.accumulation(launch.data_size)
    slots = slots_of_rank(launch.data_rank, launch.data_size, accumulation, config.train.micro_batch_size)
    schedule = objectives.build(config, MASK, False)
    groups = [SlotGroup(part, stream, schedule, launch.device) for part in slots]
    average, guard = engine.average, Guard(config.guard, config.optimizer.gradient_clip)  # type: ignore[attr-defined]
    ways = {"neither": (None, None), "guard": (guard, None), "average": (None, average)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    step = 0
    for number in range(1 + ROUNDS):  # the first one warms up
        for name, (judge, kept) in ways.items():
            engine.average = kept  # type: ignore[attr-defined]
            engine.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                step += 1
                _, norm = train_step(engine, groups, 1e-4, step, judge)
                float(norm)
            if number:
                times[name].append((time.perf_counter() - began) / STEPS)
    if launch.rank == 0:
        print(f"{launch.world_size} ranks on {launch.device.type}, {ROUNDS} x {STEPS} steps each way")
        for name, values in times.items():
            ratio = median(values) / median(times["neither"])
            print(f"{name:8} {1e3 * median(values):8.2f} ms a step   x {ratio:.4f}")
    stream.close()
    engine.close()


if __name__ == "__main__":
    run(main)
