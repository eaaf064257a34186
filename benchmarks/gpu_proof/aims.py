"""What one H100 is meant to reach, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Parts = Mapping[str, Mapping[str, Any]]
MEMORY = 0.07  # relative error of the planned memory
MFU = {"125M": 0.25, "350M": 0.40, "1B": 0.45}  # by the fastest way of training each preset with PUMA


@dataclass(frozen=True)
class Aim:
    """One aim.

    Attributes:
        name: what is aimed at.
        bound: the aim, in words.
        measured: the value, in words; None when it was not measured.
        reached: whether it was reached; None when it was not measured.
    """

    name: str
    bound: str
    measured: str | None
    reached: bool | None


def figures(parts: Parts, name: str) -> Mapping[str, Any]:
    """Return the figures of a part; empty without any."""
    return (parts.get(name) or {}).get("figures") or {}


def fastest(parts: Parts, size: str) -> tuple[str, float | None]:
    """Return the training of this size with the highest MFU, and that; the size and None without any."""
    runs = {name: figures(parts, name) for name in parts if name.startswith(f"{size}_")}
    rates = {name: run["mfu"] for name, run in runs.items() if run.get("mfu") and run["objective"] == "puma"}
    name = max(rates, key=lambda each: rates[each], default=size)
    return name, rates.get(name)


def aims(parts: Parts) -> list[Aim]:
    """Return every aim, with what the parts found."""
    ratios = figures(parts, "step").get("ratios", {})
    found = [
        _judged("step time, PUMA / random masking", ratios.get("time, PUMA / random masking"), "at most 1.02",
                lambda value: value <= 1.02),
        _judged("step time, PUMA / full logits", ratios.get("time, PUMA / full logits"), "at most 0.4",
                lambda value: value <= 0.4),
    ]  # fmt: skip
    for size, least in MFU.items():
        name, value = fastest(parts, size)
        found.append(
            _judged(f"MFU, {name}", value, f"at least {least:.2f}", lambda value, least=least: value >= least)
        )
    memories = [figures(parts, name).get("memory") for name in parts]
    planned = [memory["planned / allocated"] for memory in memories if memory]
    worst = max(planned, key=lambda ratio: abs(ratio - 1), default=None)
    found.append(
        _judged(f"memory, planned / allocated, worst of {len(planned)}", worst, f"within {MEMORY:.0%}",
                lambda ratio: abs(ratio - 1) <= MEMORY)
    )  # fmt: skip
    resumed = figures(parts, "resume")
    kills = resumed.get("kills") or None  # an undisturbed run proves nothing
    differing = resumed["differing"] if kills else None
    found.append(_judged("values that differ after a resume", differing, "0", lambda value: value == 0))
    beyond = figures(parts, "numerics").get("beyond")
    found.append(
        _judged("errors against float64 beyond their tolerance", None if beyond is None else len(beyond), "0",
                lambda value: value == 0)
    )  # fmt: skip
    return found


def _judged(name: str, value: float | None, bound: str, reaches: Callable[[float], bool]) -> Aim:
    """Return an aim beside its value, where there is one."""
    if value is None:
        return Aim(name, bound, None, None)
    return Aim(name, bound, f"{value:.3f}" if isinstance(value, float) else str(value), reaches(value))
