"""The error of a summed bf16 gradient, and of AdamW's first update from it, for each width of the sum.

usage: python -m benchmarks.gradient_precision [--micro-batches 1 32 128] [--ranks 2] [--output FILE.json]

Every micro-batch has its gradient from the same bf16 weights, whoever computes it. One process adds those of
all micro-batches in float64; that sum is exact. Ranks of ZeRO-2 and ZeRO-3 then sum the same micro-batches as
`communication_data_type` (over ranks) and `data_types.grad_accum_dtype` (over micro-batches) say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import add_output, write_figures
from benchmarks.random_text import config_with
from benchmarks.ranks import on_ranks
from pipeline.base.cli import ToolParser, run
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine
from pipeline.model.batch import MaskedBatch, Vocabulary
from pipeline.ranks import join_ranks

TOKENS, LENGTH, SEQUENCES, MASK = 500, 32, 4, 3
EPSILON = 1e-8
SETTINGS = f"""
    --data.sequence_length {LENGTH} --engine.precision bf16 --engine.device cpu
    --optimizer.gradient_clip 0 --train.micro_batch_size {SEQUENCES}
    --model.layers 2 --model.hidden_size 128 --model.heads 4 --model.intermediate_size 384
""".split()
CHOICES = {
    "fp32 over ranks and micro-batches": ("fp32", "fp32"),
    "bf16 over ranks, fp32 over micro-batches": ("bf16", "fp32"),
    "bf16 over ranks and micro-batches": ("bf16", "bf16"),
}


def batch_of(number: int) -> MaskedBatch:
    """Return micro-batch `number`: random tokens, half of them masked."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(MASK + 1, TOKENS, (SEQUENCES, LENGTH), generator=generator)
    masked = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.5
    rows = masked.flatten().nonzero().flatten()
    weights = torch.full((len(rows),), 1 / len(rows))
    inputs = tokens.masked_fill(masked, MASK)
    return MaskedBatch(inputs, None, rows, tokens.flatten()[rows], weights)


def gradients(engine: Any, numbers: Sequence[int]) -> Tensor:
    """Return the gradient of the mean loss of some micro-batches, all weights in a row; no update."""
    from deepspeed.utils import safe_get_full_grad  # after DS_ACCELERATOR is set

    found: list[Tensor] = []

    def keep(norm: Tensor) -> bool:
        found.extend(safe_get_full_grad(weight).double().flatten() for weight in engine.names)
        return False

    for number in numbers:
        engine.backward(engine.forward(batch_of(number)).loss)
    engine.step(0.0, keep)
    return torch.cat(found)


def start_engine(stage: int, choice: str, micro_batches: int) -> Engine:
    """Return an engine around the weights of the run's seed, for `micro_batches` over all ranks."""
    reduction, accumulation = CHOICES[choice]
    settings = {
        "zero_optimization": {"stage": stage},
        "communication_data_type": reduction,
        "data_types": {"grad_accum_dtype": accumulation},
    }
    ranks = join_ranks("cpu")
    ranks.connect()
    batch = ["--train.global_batch_size", str(micro_batches * SEQUENCES)]
    with config_with(settings, [*SETTINGS, *batch]) as config:
        return build_engine(config, ranks, Vocabulary(TOKENS, TOKENS, MASK))


def measure(stage: int, choice: str, micro_batches: int) -> Tensor:
    """Return the gradient of `micro_batches`, dealt to the ranks in turn; called on the ranks."""
    engine = start_engine(stage, choice, micro_batches)
    return gradients(engine, range(engine.ranks.rank, micro_batches, engine.ranks.world_size))


def measure_exact(counts: Sequence[int]) -> dict[int, Tensor]:
    """Return the exact mean gradient of the first micro-batches for each of `counts`, in one process."""
    engine = start_engine(2, next(iter(CHOICES)), 1)
    total, sums = torch.zeros((), dtype=torch.float64), {}
    for number in range(max(counts)):
        total = total + gradients(engine, [number])
        if number + 1 in counts:
            sums[number + 1] = total / (number + 1)
    return sums


def first_update(gradient: Tensor) -> Tensor:
    """Return AdamW's first update without weight decay and learning rate (arXiv 1711.05101, algorithm 2)."""
    return gradient / (gradient.abs() + EPSILON)


def relative_error(measured: Tensor, exact: Tensor) -> float:
    """Return |measured - exact| / |exact|."""
    return float((measured - exact).norm() / exact.norm())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every choice and print the errors."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 32, 128], help="of each rank")
    parser.add_argument("--ranks", type=int, default=2, help="world size")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="ZeRO stages")
    add_output(parser)
    options = parser.parse_args(arguments)
    counts = [count * options.ranks for count in options.micro_batches]
    results = []
    sums = on_ranks(1, measure_exact, counts)
    print(f"{'micro-batches of a rank':>24}  stage  {'gradient':>9}  {'update':>9}  summed in", flush=True)
    for choice in CHOICES:
        for stage in options.stages:
            for each, count in zip(options.micro_batches, counts, strict=True):
                gradient, true = on_ranks(options.ranks, measure, stage, choice, count), sums[count]
                errors = {
                    "gradient": relative_error(gradient, true),
                    "first update": relative_error(first_update(gradient), first_update(true)),
                }
                results.append({"sum": choice, "stage": stage, "micro-batches": each} | errors)
                values = "  ".join(f"{value:9.1e}" for value in errors.values())
                print(f"{each:24}  {stage:5}  {values}  {choice}", flush=True)
    content = {"torch": torch.__version__, "ranks": options.ranks, "errors": results}
    write_figures(options.output, content)


if __name__ == "__main__":
    run(main)
