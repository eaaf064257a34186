"""How long a save keeps training waiting: written behind it, against written at once, in turns.

usage: torchrun --standalone --nproc_per_node 2 -m benchmarks.checkpoint_stall [--section.key value ...]

Two figures a save: the stall, during which the loop stands still in `Saver.save`, and the drag, by which the
steps afterwards are slower than the others while the files are written (on a CPU the writing takes its time
from training). The table is written to benchmarks/results/checkpoint_stall.json.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.random_text import engine_on_random_text
from pipeline import config as configuration
from pipeline.base.cli import run
from pipeline.chains.slots import SlotGroup
from pipeline.checkpoint.manifest import FORMAT, Manifest
from pipeline.checkpoint.saving import Saver
from pipeline.config import Config
from pipeline.engine.protocol import Engine
from pipeline.train import train_step

ROUNDS, TOKENS = 3, 32000
RESULT = Path("benchmarks/results/checkpoint_stall.json")
SETTINGS = """
    --run_dir runs/checkpoint_stall --data.prefixes [unused] --data.tokenizer unused --checkpoint.keep 1
    --data.sequence_length 16 --train.global_batch_size 2 --train.micro_batch_size 1 --model.layers 12
    --model.hidden_size 768 --model.heads 12 --model.intermediate_size 2048
""".split()


class Training:
    """Steps one after the other, timed on all ranks together."""

    def __init__(self, engine: Engine, groups: list[SlotGroup]) -> None:
        self.engine = engine
        self.groups = groups
        self.step = 0

    def timed_step(self) -> float:
        """Run a step and return its seconds."""
        self.engine.ranks.barrier()
        began = time.perf_counter()
        self.step += 1
        _, norm = train_step(self.engine, self.groups, 1e-4, self.step)
        float(norm)
        self.engine.ranks.barrier()
        return time.perf_counter() - began

    def timed_save(self, saver: Saver, manifest: Manifest) -> tuple[float, float]:
        """Save; return the seconds of the stall, and of the drag until the files are written."""
        usual = median(self.timed_step() for _ in range(3))
        self.engine.ranks.barrier()
        began = time.perf_counter()
        saver.save(dataclasses.replace(manifest, step=self.step))
        self.engine.ranks.barrier()
        stall, drag = time.perf_counter() - began, 0.0
        while any(self.engine.ranks.all_gather(saver.writing())):
            drag += self.timed_step() - usual
        saver.wait()
        return stall, drag


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the table."""
    config = configuration.load([*SETTINGS, *(sys.argv[1:] if arguments is None else arguments)])
    with engine_on_random_text(config, TOKENS) as (engine, groups):
        measure(config, engine, groups)


def measure(config: Config, engine: Engine, groups: list[SlotGroup]) -> None:
    """Save in both ways, in turns, and report."""
    ranks, slots = engine.ranks.world_size, config.train.global_batch_size
    manifest = Manifest(FORMAT, 0, 0, ranks, engine.sharding, slots, {}, "")
    training = Training(engine, groups)
    said: list[str] = []
    savers = {}
    for name, asynchronous in (("blocking", False), ("asynchronous", True)):
        settings = dataclasses.replace(config.checkpoint, asynchronous=asynchronous)
        savers[name] = Saver(dataclasses.replace(config, checkpoint=settings), engine, groups, said.append)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in savers}
    for _ in range(ROUNDS):
        for name, saver in savers.items():
            times[name].append(training.timed_save(saver, manifest))
    if engine.ranks.is_first:
        report(times, said[-1], f"{ranks} ranks on {engine.ranks.device.type}")
        shutil.rmtree(config.run_dir)


def report(times: dict[str, list[tuple[float, float]]], saved: str, where: str) -> None:
    """Print and write the table; the very first save of all makes the buffers, and is shown apart."""
    whole = median(stall for stall, _ in times["blocking"])
    rows = {}
    for name, values in times.items():
        stall, drag = (median(column) for column in zip(*values, strict=True))
        rows[name] = {"stall_s": round(stall, 3), "stall_share": round(stall / whole, 4),
                      "drag_s": round(drag, 3), "first_stall_s": round(values[0][0], 3)}  # fmt: skip
        print(f"{name:13} stall {stall:6.3f} s ({stall / whole:6.1%})   drag {drag:6.3f} s", flush=True)
    facts = {"where": where, "machine": platform.platform(), "torch": torch.__version__, "rounds": ROUNDS,
             "saved": saved.rsplit("(", 1)[-1].rstrip(")")}  # fmt: skip
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(facts | {"saves": rows}, indent=2) + "\n")
    print(f"{facts['saved']} a checkpoint, {where}: {RESULT}", flush=True)


if __name__ == "__main__":
    run(main)
