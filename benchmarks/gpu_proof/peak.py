"""What a GPU's memory holds at the peak of a step, by the line that asked for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

EVENTS = 1_000_000  # allocations and releases that are kept
OWN = ("/pipeline/", "/deepspeed/")  # frames of these folders name an allocation


def at_peak(step: Callable[[], Any]) -> dict[str, int]:
    """Run `step`; return the bytes at its peak beyond those before it, by line, the most first."""
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=EVENTS)
    try:
        step()
        torch.cuda.synchronize()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return largest(traces[torch.cuda.current_device()])


def largest(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the bytes by line when the events' allocations are largest.

    Args:
        events: of one device in torch's memory snapshot: action, addr, size and frames, in their order.
    """
    live: dict[int, tuple[str, int]] = {}
    now = peak = 0
    held: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for event in events:
        if event["action"] == "alloc":
            line = line_of(event.get("frames", ()))
            live[event["addr"]] = (line, event["size"])
            held[line] += event["size"]
            now += event["size"]
            if now > peak:
                peak, found = now, held.copy()
        elif event["action"] == "free_requested" and event["addr"] in live:
            line, size = live.pop(event["addr"])
            held[line] -= size
            now -= size
    return {line: size for line, size in found.most_common() if size}


def line_of(frames: Iterable[Mapping[str, Any]]) -> str:
    """Return file, line and function of the innermost frame in `OWN`."""
    for frame in frames:
        name = frame["filename"].replace("\\", "/")
        for folder in OWN:
            if folder in name:
                place = folder[1:] + name.rpartition(folder)[2]
                return f"{place}:{frame['line']} {frame['name']}"
    return "elsewhere (backward)"
