"""What a training step costs the host, by engine: a model of tiny matrices, whose arithmetic takes no time.

usage: python -m benchmarks.host_time [--layers 14] [--rounds 3] [--output FILE.json]

A GPU waits whenever the host launches kernels more slowly than they run. Here one CPU rank trains layers of
width 32 in bf16; what remains is dispatch, hooks, autograd and Python. The cases take turns, each in a
process of its own; the fastest block of steps of all turns counts, since other work only adds time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.random_text import engine_on_random_text
from benchmarks.ranks import start_ranks
from benchmarks.train_step import machine
from pipeline import config as configuration
from pipeline.base.cli import ToolParser, run
from pipeline.resilience.guard import Guard
from pipeline.train import train_step

TOKENS, WARM_UP, BLOCKS, STEPS = 200, 5, 5, 8
SETTINGS = """
    --run_dir unused --data.prefixes [unused] --data.sequence_length 16 --engine.device cpu
    --engine.precision bf16 --train.global_batch_size 2 --train.micro_batch_size 2 --model.hidden_size 32
    --model.heads 2 --model.intermediate_size 32 --optimizer.ema_decay 0.999
""".split()
ZERO_2: dict[str, Any] = {"stage": 2}
ZERO_3: dict[str, Any] = {"stage": 3}
OF_LAYERS = ZERO_3 | {"leaf_module": {"classes": []}}
COMPILED = ("--engine.compile", "true")
CASES: dict[str, tuple[dict[str, Any] | None, tuple[str, ...]]] = {
    "plain": (None, ()),
    "plain, compiled": (None, COMPILED),
    "ZeRO-2": (ZERO_2, ()),
    "ZeRO-2, compiled": (ZERO_2, COMPILED),
    "ZeRO-3, gathers layers": (OF_LAYERS, ()),
    "ZeRO-3": (ZERO_3, ()),
    "ZeRO-3, compiled": (ZERO_3, COMPILED),
}
BASE = "ZeRO-3, gathers layers"


def measure(name: str, layers: int, output: Path) -> None:
    """Train; write the seconds of a step in each block of steps."""
    zero, more = CASES[name]
    kind = ["--engine.kind", "plain"]
    if zero is not None:
        path = output.with_suffix(".deepspeed.json")
        path.write_text(json.dumps({"zero_optimization": zero}))
        kind = ["--engine.deepspeed_config", str(path)]
    config = configuration.load([*SETTINGS, "--model.layers", str(layers), *kind, *more])
    seconds = []
    with engine_on_random_text(config, TOKENS, config.data.sequence_length) as (engine, groups):
        guard, step = Guard(config.guard, config.optimizer.gradient_clip), 0
        for count in (WARM_UP, *[STEPS] * BLOCKS):
            began = time.perf_counter()
            for _ in range(count):
                step += 1
                train_step(engine, groups, 1e-4, step, guard)
            seconds.append((time.perf_counter() - began) / count)
        where = machine(engine.ranks.device)
    output.write_text(json.dumps({"seconds": seconds[1:], "machine": where}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case in turns, and print the fastest blocks; the processes call this too."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--layers", type=int, default=14, help="transformer blocks")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each case")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), help="cases")
    parser.add_argument("--measure", choices=list(CASES), help="called in the processes")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.measure:
        return measure(options.measure, options.layers, options.output)
    blocks: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "measured.json"
        own = [__spec__.name, "--layers", str(options.layers), "--output", str(output)]
        for _ in range(options.rounds):
            for name in options.only:
                start_ranks(name, 1, [*own, "--measure", name])
                found = json.loads(output.read_text())
                blocks[name] += found["seconds"]
    fastest = {name: min(of_case) for name, of_case in blocks.items()}
    base = fastest.get(BASE)
    for name, seconds in fastest.items():
        ratio = f"{seconds / base:8.2f} of {BASE}" if base else ""
        print(f"{name:28} {1e3 * seconds:7.1f} ms{ratio}", flush=True)
    if options.output:
        content = {"layers": options.layers, "machine": found["machine"], "step_seconds": fastest}
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    run(main, of_ranks=True)
