"""What the programs of the proof share: a clock that waits for the device, and their command line."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import seconds
from pipeline.base.cli import ToolParser


def there() -> torch.device:
    """Return the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_each(action: Callable[[], Any], device: torch.device, times: int = 20, rounds: int = 3) -> float:
    """Return the seconds of an action: the median round of `times` calls; the first round is not counted."""
    times = times if device.type == "cuda" else 1

    def round_of() -> None:
        for _ in range(times):
            action()

    round_of()
    return statistics.median(seconds(round_of, device, True) for _ in range(rounds)) / times


def wait(device: torch.device) -> float:
    """Wait for the device; return the time, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures of a part, and print those that are single numbers."""
    for name, value in figures.items():
        if isinstance(value, int | float | str):
            print(f"{name:48} {value:.4g}" if isinstance(value, float) else f"{name:48} {value}", flush=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def output_of(description: str | None, arguments: Sequence[str] | None) -> Path:
    """Return the JSON file of a program that has no other option."""
    parser = ToolParser(description or "")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    path: Path = parser.parse_args(arguments).output
    return path
