"""Print a plan, and suggest changes if it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from pipeline.base.errors import UserError
from pipeline.planning.gpus import GIB
from pipeline.planning.run_plan import SECONDS_A_DAY, Planner, RunPlan

GIGA = 1e9
UNITS = (("days", 2 * 86_400.0, 86_400.0), ("h", 7200.0, 3600.0), ("min", 120.0, 60.0), ("s", 1.0, 1.0))
COUNTS = tuple(2**n for n in range(3, 11))  # GPUs of the table


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run fit, and the resulting bytes per GPU."""

    change: str
    total: int


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit."""
    for unit, least, size in UNITS:
        if seconds >= least:
            return f"{seconds / size:,.1f} {unit}"
    return f"{1e3 * seconds:.1f} ms"


def remedies(planner: Planner, gpus: int) -> list[Remedy]:
    """Return the single changes that make the run fit, cheapest first."""
    config, zero = planner.config, planner.zero
    plan = planner.plan(gpus)
    smaller = max(1, plan.largest_micro_batch)
    train = replace(config.train, micro_batch_size=smaller)
    tried = [(f"train.micro_batch_size: {smaller}", replace(config, train=train), zero)]
    for recompute in ("swiglu", "blocks"):
        engine = replace(config.engine, activation_checkpointing=recompute)
        tried.append((f"engine.activation_checkpointing: {recompute}", replace(config, engine=engine), zero))
    changes: list[tuple[bool, str, dict[str, Any]]] = [
        (zero.stage < 3, "stage: 3", {"stage": 3}),
        (zero.bucket > 5 * 10**7, "reduce_bucket_size: 50000000", {"bucket": 5 * 10**7}),
        (zero.stage == 3 and zero.live > 10**8, "stage3_max_live_parameters: 100000000", {"live": 10**8}),
        (zero.stage > 0 and zero.optimizer == "gpu", "offload_optimizer", {"optimizer": "cpu"}),
    ]
    tried += [
        (f"zero_optimization.{change}", config, replace(zero, **values))
        for helps, change, values in changes
        if helps
    ]
    found = []
    for change, changed, settings in tried:
        other = Planner(changed, settings, planner.vocabulary_rows, planner.gpu, planner.assumed).plan(gpus)
        if other.fits:
            found.append(Remedy(change, other.memory.total))
    more = next((plan for plan in table(planner, largest=False) if plan.gpus > gpus and plan.fits), None)
    if more is not None:
        found.append(Remedy(f"--gpus {more.gpus}", more.memory.total))
    return found


def table(planner: Planner, price: float | None = None, largest: bool = True) -> list[RunPlan]:
    """Return the plans for each number of GPUs that divides the batch; see `Planner.plan` for `largest`."""
    plans = []
    for gpus in COUNTS:
        try:
            plans.append(planner.plan(gpus, price, largest))
        except UserError:
            continue
    return plans


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Return a plan as nested dictionaries, in bytes and seconds."""
    memory = {"total": plan.memory.total, "fits": plan.fits}
    values = dataclasses.asdict(plan)
    values["memory"] |= memory
    values["flops"] |= {"model": plan.flops.model, "executed": plan.flops.executed}
    return values


def describe(planner: Planner, plan: RunPlan, gpu_name: str, sources: Mapping[str, str]) -> str:
    """Format a plan as text.

    Args:
        planner: of the plan.
        plan: the plan.
        gpu_name: of the GPU, as in GPUS.
        sources: of assumptions that were given or measured, by name.
    """
    config = planner.config
    train, length = config.train, config.data.sequence_length
    tokens, total = train.batch_at(train.steps) * length, train.examples_until(train.steps) * length
    sizes = " to ".join(
        f"{size:,}" for size in sorted({train.global_batch_size, train.batch_at(train.steps)})
    )
    zero = f"ZeRO-{planner.zero.stage} ({config.engine.deepspeed_config})" if planner.zero.stage else "plain"
    lines = [
        f"{plan.parameters / 1e6:,.1f} M parameters; {train.steps:,} steps of {sizes} "
        f"examples of {length:,} tokens, {total / GIGA:,.1f} G tokens",
        f"{plan.gpus} x {gpu_name}, {zero}, micro-batch {plan.micro_batch} x {plan.accumulation} per rank, "
        f"activation checkpointing {config.engine.activation_checkpointing}",
        "",
        f"peak memory per GPU in GiB ({plan.memory.phase})",
        *_rows({name: size / GIB for name, size in plan.memory.parts.items()}, "8.2f"),
        f"  {'total':24}{plan.memory.total / GIB:8.2f}  of {plan.usable / GIB:.1f} usable: "
        + (f"fits, up to a micro-batch of {plan.largest_micro_batch}" if plan.fits else "DOES NOT FIT"),
    ]
    for name, size in (("host memory", plan.memory.host), ("NVMe", plan.memory.nvme)):
        if size:
            lines.append(f"  {f'in {name}, per GPU':24}{size / GIB:8.2f}")
    if not plan.fits:
        lines += _remedy_lines(remedies(planner, plan.gpus))
    lines += [
        "",
        *_ramp_lines(plan, length),
        f"per step: {plan.flops.model:.3g} FLOPs, plus {plan.flops.recomputed:.3g} recomputed",
        *(f"  {name:24}{duration(seconds):>11}" for name, seconds in plan.seconds.items()),
        f"  {'MFU':24}{plan.mfu:8.2f}",
        f"  {'tokens/s':24}{tokens / plan.seconds['step']:8,.0f}",
        "",
        "collectives per step in GB",
        *_rows({n: b / GIGA for n, b in dataclasses.asdict(plan.communication).items() if b}, "8.2f"),
        "",
        f"checkpoint: {tqdm.format_sizeof(plan.checkpoint, 'B')}, {plan.checkpoint_seconds:,.1f} s to "
        f"write; up to {plan.kept_checkpoints} on disk, "
        f"{tqdm.format_sizeof(plan.kept_checkpoints * plan.checkpoint, 'B')}",
        f"run: {duration(plan.days * SECONDS_A_DAY)}, {plan.days * 24 * plan.gpus:,.0f} GPU hours"
        + ("" if plan.cost is None else f", cost {plan.cost:,.0f}"),
        f"held-out losses: {duration(plan.held_out_seconds)} more, "
        f"{plan.held_out_seconds / plan.days / SECONDS_A_DAY:.2%} of the run",
        "",
        "what the times and the usable memory rest on",
        *(
            f"  {name.replace('_', ' '):28}{value:>10.4g}  {of}"
            for name, value, of in basis(planner, sources)
        ),
    ]
    return "\n".join(lines)


def basis(planner: Planner, sources: Mapping[str, str]) -> list[tuple[str, float, str]]:
    """Return name, value and source of every figure that a plan does not compute."""
    gpu = planner.gpu
    sheet = {
        "TFLOP/s of bf16 products": gpu.flops / 1e12,
        "memory, GiB": gpu.memory / GIB,
        "memory, GB/s": gpu.memory_bandwidth / GIGA,
        "link in a node, GB/s": gpu.link / GIGA,
        "network, GB/s": gpu.network / GIGA,
    }
    rows = [(name, value, "data sheet") for name, value in sheet.items()]
    if planner.config.data.isolate_documents:
        pairs, source = planner.within, "index of data.prefixes"
        if pairs is None:
            pairs, source = float(planner.config.data.sequence_length**2), "assumed, without data"
        rows.append(("pairs in one document", pairs, source))
    known = {"host_milliseconds": "benchmarks/host_time.py", **sources}
    assumed = dataclasses.asdict(planner.assumed) | {"host_milliseconds": planner.host_milliseconds}
    return rows + [(name, value, known.get(name, "assumed")) for name, value in assumed.items()]


def _ramp_lines(plan: RunPlan, length: int) -> list[str]:
    """Describe the batches of a ramp; nothing without one."""
    if not plan.batches:
        return []
    rows = [
        f"  from step {each.first_step:<10,}{each.global_batch_size:>8,} examples, micro-batch "
        f"{plan.micro_batch} x {each.accumulation}, {duration(each.seconds)} a step, MFU {each.mfu:.2f}, "
        f"{each.global_batch_size * length / each.seconds:,.0f} tokens/s"
        for each in plan.batches
    ]
    return ["batch ramp", *rows, "", "with the largest batch"]


def _rows(values: dict[str, float], form: str) -> list[str]:
    return [f"  {name.replace('_', ' '):24}{value:{form}}" for name, value in values.items()]


def _remedy_lines(found: list[Remedy]) -> list[str]:
    if not found:
        return [
            "  no single change is enough; combine train.micro_batch_size: 1, more --gpus, "
            "engine.activation_checkpointing: blocks, ZeRO-3 and offload_optimizer"
        ]
    return [
        "  it fits with one of these changes:",
        *(f"    {r.change}  ({r.total / GIB:.2f} GiB)" for r in found),
    ]


def describe_table(plans: Sequence[RunPlan]) -> str:
    """Format plans as an aligned table."""
    heading = ("GPUs", "micro-batch", "GiB", "fits", "a step", "MFU", "the run", "GPU hours", "cost")
    rows = [heading]
    for plan in plans:
        rows.append(
            (
                str(plan.gpus),
                f"{plan.micro_batch} x {plan.accumulation}",
                f"{plan.memory.total / GIB:.1f}",
                "yes" if plan.fits else "no",
                duration(plan.seconds["step"]),
                f"{plan.mfu:.2f}",
                duration(plan.days * SECONDS_A_DAY),
                f"{plan.days * 24 * plan.gpus:,.0f}",
                "-" if plan.cost is None else f"{plan.cost:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)
