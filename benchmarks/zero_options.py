"""What the settings of ZeRO-3 do to a step: its time, what is gathered how often, and the memory of a rank.

    python -m benchmarks.zero_options --output benchmarks/results/zero_options_cpu.json

Every option starts ranks that train the same model on the same random text. Times are those of the clock on
GPUs; on CPUs the processor time of a rank, which stays comparable on a machine that has other work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import add_output, machine, seconds, write_figures
from benchmarks.plan_memory import Collectives
from benchmarks.random_text import config_with, engine_on_random_text
from benchmarks.ranks import on_ranks
from benchmarks.train_step import RATE, SHAPES
from pipeline.base import cli
from pipeline.train import train_step

PREFETCH, PERSISTENCE = "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"
LIVE, REUSE, BUCKET = "stage3_max_live_parameters", "stage3_max_reuse_distance", "reduce_bucket_size"
SCARCE = {LIVE: 500_000, REUSE: 500_000}
OPTIONS: dict[str, dict[str, int]] = {
    "as in ds_configs/zero3.json": {},
    "prefetch 0": {PREFETCH: 0},
    "prefetch 100,000": {PREFETCH: 100_000},
    "persistence 0": {PERSISTENCE: 0},
    "persistence 1,000": {PERSISTENCE: 1_000},
    "persistence 1,000,000": {PERSISTENCE: 1_000_000},
    "live 500,000": SCARCE,
    "live 500,000, prefetch 100,000": SCARCE | {PREFETCH: 100_000},
    "live 500,000, prefetch 0": SCARCE | {PREFETCH: 0},
    "live 500,000, persistence 1,000": SCARCE | {PERSISTENCE: 1_000},
    "reduce bucket 1,000,000": {BUCKET: 1_000_000},
    "reduce bucket 500,000,000": {BUCKET: 500_000_000},
}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a rank's seconds of each step; calls, bytes and peak memory of the one before them."""
    shape = SHAPES[options.shape]
    settings = json.loads(Path("ds_configs/zero3.json").read_text())
    settings["zero_optimization"] |= OPTIONS[name]
    arguments = (
        f"--data.sequence_length {shape.length} --model.layers "
        f"{shape.layers} --model.hidden_size {shape.hidden_size} --model.heads {shape.heads} "
        f"--model.intermediate_size {shape.intermediate_size} --train.micro_batch_size {options.batch_size} "
        f"--train.global_batch_size {options.batch_size * options.ranks} --engine.device {options.device}"
    ).split()
    with contextlib.ExitStack() as stack:
        config = stack.enter_context(config_with(settings, arguments))
        with Collectives() as counted:
            engine, groups = stack.enter_context(engine_on_random_text(config, shape.vocabulary))
            for step in (1, 2):  # in the first DeepSpeed learns in which order the weights are needed
                counted.calls.clear()
                counted.bytes.clear()
                counted.peak = counted.now
                train_step(engine, groups, RATE, step)
        times = [
            seconds(lambda step=step: train_step(engine, groups, RATE, step), engine.ranks.device)
            for step in range(3, 3 + options.steps)
        ]
        facts = machine(engine.ranks.device)
    gathers = [kind for kind in counted.calls if "allgather" in kind]
    return {
        "seconds": times,
        "all-gathers": sum(counted.calls[kind] for kind in gathers),
        "all-gathered bytes": sum(counted.bytes[kind] for kind in gathers),
        "peak bytes": counted.peak,
        "machine": facts,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every option, print a table and write the figures."""
    parser = cli.ToolParser(description="What the settings of ZeRO-3 do to a step.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="network and sequences")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a rank")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    gpus = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=gpus, help="where")
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), help="options")
    add_output(parser)
    options = parser.parse_args(arguments)
    results = {}
    for name in options.only:
        found = results[name] = on_ranks(options.ranks, measure, name, options, device=options.device)
        print(
            f"{name:32} {statistics.median(found['seconds']):8.4f} s {found['all-gathers']:4} all-gathers"
            f"{found['all-gathered bytes'] / 1e6:8.1f} MB, peak {found['peak bytes'] / 1e6:8.1f} MB",
            flush=True,
        )
    facts = {"shape": options.shape, "batch_size": options.batch_size, "ranks": options.ranks}
    write_figures(options.output, facts | {"options": results})


if __name__ == "__main__":
    cli.run(main)
