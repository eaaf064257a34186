"""What the settings of ZeRO-3 do to a step: its time, what is gathered how often, and the memory of a rank.

    python -m benchmarks.zero_options --output benchmarks/results/zero_options_cpu.json

Every option starts ranks that train the same model on the same random text. Times are those of the clock on
GPUs; on CPUs the processor time of a rank, which stays comparable on a machine that has other work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan_memory import Collectives
from benchmarks.random_text import engine_on_random_text
from benchmarks.ranks import start_ranks
from benchmarks.train_step import RATE, SHAPES, machine, seconds
from pipeline import config as configuration
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


def measure(changes: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Return a rank's seconds of each step; calls, bytes and peak memory of the one before them."""
    shape = SHAPES[options.shape]
    path = options.output.with_suffix(f".{os.environ['RANK']}.json")
    settings = json.loads(Path("ds_configs/zero3.json").read_text())
    settings["zero_optimization"] |= changes
    path.write_text(json.dumps(settings))
    config = configuration.load(
        f"--run_dir unused --data.prefixes [unused] --data.sequence_length {shape.length} --model.layers "
        f"{shape.layers} --model.hidden_size {shape.hidden_size} --model.heads {shape.heads} "
        f"--model.intermediate_size {shape.intermediate_size} --train.micro_batch_size {options.batch_size} "
        f"--train.global_batch_size {options.batch_size * options.ranks} "
        f"--engine.deepspeed_config {path} --engine.device {options.device}".split()
    )
    with contextlib.ExitStack() as stack:
        with Collectives() as counted:
            running = engine_on_random_text(config, shape.vocabulary, shape.length)
            engine, groups = stack.enter_context(running)
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


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of an option and return what the first has measured."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        numbers = ("shape", "batch_size", "steps", "ranks", "device")
        given = [
            part for key in numbers for part in (f"--{key.replace('_', '-')}", str(getattr(options, key)))
        ]
        start = [__spec__.name, "--measure", name, "--output", str(output), *given]
        start_ranks(name, options.ranks, start, options.device)
        found: dict[str, Any] = json.loads(output.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every option, print a table and write the figures; the ranks call this too."""
    parser = cli.ToolParser(description="What the settings of ZeRO-3 do to a step.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="network and sequences")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a rank")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    gpus = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=gpus, help="where")
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), help="options")
    parser.add_argument("--measure", choices=list(OPTIONS), help="called on the ranks")
    parser.add_argument("--output", type=Path, default=argparse.SUPPRESS, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.measure:
        found = measure(OPTIONS[options.measure], options)
        if os.environ["RANK"] == "0":
            options.output.write_text(json.dumps(found))
        return
    results = {}
    for name in options.only:
        found = results[name] = compare(name, options)
        print(
            f"{name:32} {statistics.median(found['seconds']):8.4f} s {found['all-gathers']:4} all-gathers"
            f"{found['all-gathered bytes'] / 1e6:8.1f} MB, peak {found['peak bytes'] / 1e6:8.1f} MB",
            flush=True,
        )
    if "output" in options:
        facts = {"shape": options.shape, "batch_size": options.batch_size, "ranks": options.ranks}
        options.output.write_text(json.dumps(facts | {"options": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, of_ranks=True)
