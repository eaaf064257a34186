"""What a training step costs the host, by engine: a model of tiny matrices, whose arithmetic takes no time.

usage: python -m benchmarks.host_time [--layers 14] [--rounds 3] [--output FILE.json]

A GPU waits whenever the host launches kernels more slowly than they run. Here one CPU rank trains layers of
width 32 in bf16; what remains is dispatch, hooks, autograd and Python. The cases take turns, each in a
process of its own; the fastest block of steps of all turns counts, since other work only adds time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.figures import add_output, machine, write_figures
from benchmarks.random_text import config_with, engine_on_random_text
from benchmarks.ranks import on_ranks
from pipeline.base.cli import ToolParser, run
from pipeline.resilience.guard import Guard
from pipeline.train import train_step

TOKENS, WARM_UP, BLOCKS, STEPS = 200, 5, 5, 8
SETTINGS = """
    --data.sequence_length 16 --engine.device cpu --engine.precision bf16
    --train.global_batch_size 2 --train.micro_batch_size 2 --model.hidden_size 32
    --model.heads 2 --model.intermediate_size 32 --optimizer.ema_decay 0.999
""".split()
ZERO_2: dict[str, Any] = {"stage": 2}
ZERO_3: dict[str, Any] = {"stage": 3}
OF_LAYERS = ZERO_3 | {"leaf_module": {"classes": []}}
PLAIN = ("--engine.kind", "plain")
COMPILED = ("--engine.compile", "true")
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, PLAIN),
    "plain, compiled": ({}, (*PLAIN, *COMPILED)),
    "ZeRO-2": (ZERO_2, ()),
    "ZeRO-2, compiled": (ZERO_2, COMPILED),
    "ZeRO-3, gathers layers": (OF_LAYERS, ()),
    "ZeRO-3": (ZERO_3, ()),
    "ZeRO-3, compiled": (ZERO_3, COMPILED),
}
BASE = "ZeRO-3, gathers layers"


def measure(name: str, layers: int) -> tuple[list[float], dict[str, Any]]:
    """Train; return the seconds of a step in each block of steps, and the machine."""
    zero, more = CASES[name]
    seconds = []
    with ExitStack() as stack:
        arguments = [*SETTINGS, "--model.layers", str(layers), *more]
        config = stack.enter_context(config_with({"zero_optimization": zero}, arguments))
        engine, groups = stack.enter_context(engine_on_random_text(config, TOKENS))
        guard, step = Guard(config.guard, config.optimizer.gradient_clip), 0
        for count in (WARM_UP, *[STEPS] * BLOCKS):
            began = time.perf_counter()
            for _ in range(count):
                step += 1
                train_step(engine, groups, 1e-4, step, guard)
            seconds.append((time.perf_counter() - began) / count)
        return seconds[1:], machine(engine.ranks.device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case in turns, and print the fastest blocks."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--layers", type=int, default=14, help="transformer blocks")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each case")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), help="cases")
    add_output(parser)
    options = parser.parse_args(arguments)
    blocks: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name in options.only:
            seconds, where = on_ranks(1, measure, name, options.layers)
            blocks[name] += seconds
    fastest = {name: min(of_case) for name, of_case in blocks.items()}
    base = fastest.get(BASE)
    for name, least in fastest.items():
        ratio = f"{least / base:8.2f} of {BASE}" if base else ""
        print(f"{name:28} {1e3 * least:7.1f} ms{ratio}", flush=True)
    write_figures(options.output, {"layers": options.layers, "machine": where, "step_seconds": fastest})


if __name__ == "__main__":
    run(main)
