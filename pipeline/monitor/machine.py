"""What a run is trained on, for its history."""

from __future__ import annotations

import platform
import socket
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.base.cpus import usable_cpus
from pipeline.checkpoint.manifest import PACKAGES
from pipeline.ranks import Ranks

_CPU_FACTS = Path("/proc/cpuinfo")


def machine_of(ranks: Ranks) -> dict[str, Any]:
    """Return the hosts and devices of all ranks, and the CPUs, memory and versions of this one.

    Every rank calls this.
    """
    device = ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    places = ranks.all_gather((socket.gethostname(), name))
    return {
        "hosts": list(dict.fromkeys(host for host, _ in places)),
        "devices": dict(Counter(name for _, name in places)),
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def cpu_name() -> str:
    """Return the model of the CPUs as Linux names it, elsewhere their architecture."""
    lines = _CPU_FACTS.read_text(encoding="utf-8").splitlines() if _CPU_FACTS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
