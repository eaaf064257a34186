"""What the machine and SLURM give to this process."""

from __future__ import annotations

import os

from pipeline.base.errors import UserError


def usable_cpus() -> int:
    """Return how many CPUs this process may use: those of its affinity, at most SLURM_CPUS_PER_TASK."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(count, slurm_number("SLURM_CPUS_PER_TASK", count)))


def slurm_number(name: str, default: int) -> int:
    """Return the number in an environment variable of SLURM, `default` if it is missing or empty.

    Raises:
        UserError: if it is no number.
    """
    value = os.environ.get(name, "").strip() or str(default)
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name} is {value!r}, no number: unset it, or set it as SLURM does.") from None
