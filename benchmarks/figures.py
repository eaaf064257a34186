"""What benchmarks share: a clock, the machine that was measured, and the JSON file of the figures."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add --output; its folder is made at once, not after an hour of measuring."""
    parser.add_argument("--output", type=_new_file, help="JSON file for the figures")


def _new_file(text: str) -> Path:
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write what --output asks for."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def seconds(action: Callable[[], Any], device: torch.device, wall_clock: bool = False) -> float:
    """Return how long an action takes: by the clock on a GPU, else by the processor time of this process.

    Processor time stays comparable on a machine that has other work.
    """
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu or wall_clock else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    action()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def machine(device: torch.device) -> dict[str, Any]:
    """Return the facts that a time is worth nothing without."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
