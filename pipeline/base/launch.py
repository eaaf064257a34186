"""The place of this process in a launch of several, by its environment; and which of them says an error."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
from typing import NamedTuple

_claims: list[socket.socket] = []  # held until the process ends


class Place(NamedTuple):
    """The place that torchrun, the deepspeed launcher or srun gives a process; 0, 0, 1 without one.

    Attributes:
        rank: index of the process.
        local_rank: index of the process on its node.
        world_size: number of processes.
    """

    rank: int
    local_rank: int
    world_size: int


def place() -> Place:
    """Return the place of this process; a launcher inside a step of srun knows better than srun."""
    by_launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    by_slurm = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    given = os.environ.get
    several = "RANK" not in os.environ and int(given("SLURM_STEP_NUM_TASKS") or 1) > 1
    defaults = zip(by_slurm if several else by_launcher, "001", strict=True)
    return Place(*(int(given(name) or default) for name, default in defaults))


def says(message: str) -> bool:
    """Return whether this process is the first of its launch, on this machine, to say `message` on stderr.

    Ranks with log files of their own all say it. The name of a socket is taken by the first process that asks
    for it, and is free when that one has ended.
    """
    launch = [os.environ.get(name, "") for name in ("MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")]
    name = hashlib.sha256("\n".join([*launch, _log_file(), message]).encode()).hexdigest()
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0puma-{name}")
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    _claims.append(claim)
    return True


def _log_file() -> str:
    """Return the identity of the file behind stderr; empty for a terminal or a pipe."""
    try:
        facts = os.fstat(2)
    except OSError:  # closed
        return ""
    return f"{facts.st_dev}:{facts.st_ino}" if stat.S_ISREG(facts.st_mode) else ""
