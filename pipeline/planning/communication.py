"""Count the bytes of ZeRO's collectives in a step.

The formulas are checked against the collectives of two ranks (benchmarks/plan_memory.py). Sizes are those of
the full tensors; a ring moves (N - 1) / N of them through each rank, an all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.memory import Parameters, Zero


@dataclass(frozen=True)
class Communication:
    """Bytes of the collectives of a step.

    Attributes:
        all_gather: weights, over all ranks.
        group_all_gather: weights, over the ranks of an hpZ group.
        reduce_scatter: gradients; an all-reduce (ZeRO-1 and ZeRO-2) counts twice.
    """

    all_gather: int
    group_all_gather: int
    reduce_scatter: int


def step_communication(zero: Zero, parameters: Parameters, accumulation: int, width: int) -> Communication:
    """Return the communication of a step.

    ZeRO-3 gathers every weight in the forward. In the backward it gathers again the weights it had to release
    (stage3_max_live_parameters); with hpZ, from the secondary copy within a group of ranks (ZeRO++,
    arXiv 2306.10209). A tied embedding is used at both ends of both passes.

    Args:
        zero: DeepSpeed's ZeRO settings.
        parameters: parameters of the model.
        accumulation: micro-batches per step and rank.
        width: bytes per element of the weights.
    """
    count, reduced = parameters.count, zero.reduction
    if zero.stage < 3:  # ZeRO-1 accumulates full gradients and reduces them once
        reductions = accumulation if zero.stage == 2 else 1
        return Communication(count * width if zero.stage else 0, 0, 2 * reductions * count * reduced)
    kept = sum(size for size in parameters.sizes.values() if size <= zero.persistence)
    live = zero.gathered(parameters)
    again = 0 if live >= count else count - live + (2 * parameters.embedding if parameters.tied else 0)
    weight, gradient = 1 if zero.quantized_weights else width, 0.5 if zero.quantized_gradients else reduced
    first, again = accumulation * (count - kept) * weight, accumulation * again * weight
    scattered = int(accumulation * count * gradient)
    if zero.hpz > 1:
        return Communication(first, again, scattered)
    return Communication(first + again, 0, scattered)
