"""The facts that a time is worth nothing without: card, driver, versions.

usage: python -m benchmarks.gpu_proof.machine --output FILE.json
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.figures import machine
from benchmarks.gpu_proof.measuring import output_of, there, write
from pipeline.base.cli import run

PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "numpy", "transformers")


def version_of(package: str) -> str | None:
    """Return the version of a package; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def card() -> dict[str, Any]:
    """Return what torch says of the first GPU."""
    about = torch.cuda.get_device_properties(0)
    return {
        "gpus": torch.cuda.device_count(),
        "memory": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the facts."""
    path, device = output_of(__doc__, arguments), there()
    facts = machine(device) | (card() if device.type == "cuda" else {"gpus": 0})
    versions = {package: version_of(package) for package in PACKAGES} | {"python": platform.python_version()}
    write(path, facts | {"versions": versions})


if __name__ == "__main__":
    run(main)
