"""The memory and the collectives of real ZeRO steps on CPU ranks beside what the plan says of them.

usage: python -m benchmarks.plan_memory [--ranks 2] [--only NAME ...] [--output FILE.json]

Every case starts gloo ranks that train three steps. The storages of all tensors are added up while they
live (`LiveStorages`), and the tensors of all collectives of the last step; nothing of it comes from the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.figures import add_output, write_figures
from benchmarks.random_text import config_with, engine_on_random_text
from benchmarks.ranks import on_ranks
from pipeline.base.cli import ToolParser, run
from pipeline.config import Config
from pipeline.engine.build import engine_settings
from pipeline.planning.communication import step_communication
from pipeline.planning.live_memory import LiveStorages
from pipeline.planning.memory import FULL, HALF, Zero, count_parameters, plan_memory
from pipeline.planning.run_plan import checkpoint_bytes
from pipeline.train import train_step

STEPS = 3
SETTINGS = """
    --data.sequence_length 64 --train.global_batch_size 8 --train.micro_batch_size 4
    --engine.device cpu --model.layers 6 --model.hidden_size 128 --model.heads 4
    --model.intermediate_size 384 --schedule.warmup_steps 1 --train.steps 3
""".split()
LARGE = "--model.hidden_size 512 --model.heads 8 --model.intermediate_size 1536".split()
ZERO = {
    "stage": 3,
    "overlap_comm": False,
    "reduce_bucket_size": 200_000,
    "stage3_prefetch_bucket_size": 100_000,
    "stage3_param_persistence_threshold": 2_000,
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
}


@dataclass(frozen=True)
class Case:
    """A run: what it changes in SETTINGS, ZERO and the JSON around it, and the tokens of its vocabulary."""

    settings: Sequence[str] = ()
    zero: dict[str, Any] | None = None
    tokens: int = 1000
    top: dict[str, Any] | None = None


SCARCE = {"stage3_max_live_parameters": 300_000, "stage3_max_reuse_distance": 100_000}
MUON = ("--optimizer.kind", "muon")
BF16 = ("--engine.precision", "bf16")
BF16_GRADIENTS = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
CASES = {
    "all weights stay gathered": Case(),
    "300,000 weights stay gathered": Case(zero=SCARCE),
    "nothing is fetched ahead": Case(
        zero={"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    ),
    "hpz": Case(zero=SCARCE | {"zero_hpz_partition_size": 2}),
    "ZeRO-1, two micro-batches": Case(["--train.global_batch_size", "16"], {"stage": 1}),
    "ZeRO-2": Case(zero={"stage": 2}),
    "bf16": Case(BF16),
    "bf16, two micro-batches": Case([*BF16, "--train.global_batch_size", "16"], SCARCE),
    "bf16, gradients in bf16": Case(BF16, top=BF16_GRADIENTS),
    "bf16, ZeRO-2": Case(BF16, {"stage": 2}),
    "bf16, ZeRO-2, two micro-batches": Case([*BF16, "--train.global_batch_size", "16"], {"stage": 2}),
    "bf16, ZeRO-2, gradients in bf16": Case(BF16, {"stage": 2}, top=BF16_GRADIENTS),
    "bf16, 21 M parameters": Case([*BF16, *LARGE]),
    "bf16, 21 M, gradients in bf16": Case([*BF16, *LARGE], top=BF16_GRADIENTS),
    "blocks recomputed, two micro-batches": Case(
        ["--engine.activation_checkpointing", "blocks", "--train.global_batch_size", "32",
         "--train.micro_batch_size", "8", "--data.sequence_length", "128"], SCARCE
    ),
    "a vocabulary of 20,000": Case(
        ["--train.global_batch_size", "16", "--train.micro_batch_size", "8"], tokens=20_000
    ),
    "Muon": Case(MUON, SCARCE),
    "Muon, bf16, ZeRO-2": Case([*MUON, *BF16], {"stage": 2}),
    "block diffusion, untied": Case(
        ["--objective.block_size", "16", "--model.tie_embeddings", "false", "--optimizer.ema_decay", "0.99"]
    ),
    "21 M parameters": Case([*LARGE]),
    "21 M, optimizer offloaded": Case([*LARGE], {"offload_optimizer": {"device": "cpu"}}),
    "21 M, 128 tokens, nothing recomputed": Case(
        [*LARGE, "--data.sequence_length", "128", "--train.global_batch_size", "32",
         "--train.micro_batch_size", "16", "--engine.activation_checkpointing", "none"], SCARCE
    ),
}  # fmt: skip


class Collectives(LiveStorages):
    """Counts memory, and collectives by their kind: calls, and bytes of the largest tensors given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note a collective."""
        namespace, _, name = function.name().partition("::")
        if namespace == "c10d":
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
            self.bytes[name] += max(sizes)
            self.calls[name] += 1
        return super().__torch_dispatch__(function, types, args, kwargs)


@contextmanager
def config_of(case: Case, ranks: int) -> Iterator[Config]:
    """Give the configuration of a case.

    The global batches above are those of two ranks; a rank has the same work among more.
    """
    zero = ZERO | (case.zero or {})
    if zero["stage"] < 3:
        zero = {key: value for key, value in zero.items() if not key.startswith("stage3_")}
    with config_with({"zero_optimization": zero} | (case.top or {}), [*SETTINGS, *case.settings]) as config:
        batch = config.train.global_batch_size * ranks // 2
        yield replace(config, train=replace(config.train, global_batch_size=batch))


def measure(name: str, ranks: int) -> list[dict[str, Any]]:
    """Train on this rank; return what was measured on each."""
    case = CASES[name]
    with ExitStack() as stack:
        config = stack.enter_context(config_of(case, ranks))
        counted = stack.enter_context(Collectives())
        engine, groups = stack.enter_context(engine_on_random_text(config, case.tokens))
        rows = 0
        for step in range(1, STEPS + 1):
            if step == STEPS:
                rows = max(int(group.state.masked.sum()) for group in groups)
                counted.peak = counted.now
                counted.bytes.clear()
            train_step(engine, groups, 1e-4, step)
        peak, collectives = counted.peak, dict(counted.bytes)
        with TemporaryDirectory() as folder:
            states = engine.snapshot(Path(folder))
        saved = sum(t.nbytes for t in tree_leaves(states) if isinstance(t, Tensor))
        found = {"peak": peak, "rows": rows, "saved": saved, "collectives": collectives}
        return engine.ranks.all_gather(found)


def plan(case: Case, ranks: int, rows: int) -> dict[str, Any]:
    """Return what the plan says of a case: bytes."""
    with config_of(case, ranks) as config:
        zero = Zero.of(engine_settings(config))
    width = HALF if config.engine.precision == "bf16" else FULL
    parameters = count_parameters(config, case.tokens)
    memory = plan_memory(config, zero, parameters, ranks, rows, gpu_memory=None)
    traffic = step_communication(zero, parameters, config.train.accumulation(ranks), width)
    return {
        "parameters": parameters.count,
        "peak": memory.total + memory.host,  # both are the memory of the CPU here
        "parts": memory.parts,
        "phase": memory.phase,
        "all_gather": traffic.all_gather + traffic.group_all_gather,
        "reduce": traffic.reduce_scatter,
        "checkpoint": checkpoint_bytes(config, zero, parameters, width),
    }


def compare(name: str, ranks: int) -> dict[str, Any]:
    """Measure a case and return it beside its plan, with their ratios."""
    found = on_ranks(ranks, measure, name, ranks)
    planned = plan(CASES[name], ranks, max(rank["rows"] for rank in found))
    collectives = Counter(found[0]["collectives"])
    gathered = sum(size for kind, size in collectives.items() if "allgather" in kind)
    reduced = sum(size for kind, size in collectives.items() if "reduce_scatter" in kind)
    reduced += 2 * collectives["allreduce_"]
    measured = {
        "peak": max(rank["peak"] for rank in found),
        "all_gather": gathered,
        "reduce": reduced,
        "checkpoint": sum(rank["saved"] for rank in found),
    }
    ratios = {key: planned[key] / measured[key] for key in measured}
    return {"planned": planned, "measured": measured, "planned / measured": ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare every case and print the ratios."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--ranks", type=int, default=2, help="world size")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), help="cases")
    add_output(parser)
    options = parser.parse_args(arguments)
    results = {}
    print(
        f"{'planned / measured':38}"
        + "".join(f"{key:>12}" for key in ("peak", "all_gather", "reduce", "checkpoint"))
    )
    for name in options.only:
        results[name] = compare(name, options.ranks)
        ratios = results[name]["planned / measured"]
        print(f"{name:38}" + "".join(f"{value:12.3f}" for value in ratios.values()), flush=True)
    content = {"torch": torch.__version__, "ranks": options.ranks, "cases": results}
    write_figures(options.output, content)


if __name__ == "__main__":
    run(main)
