"""Several processes that train together on this machine, started for a benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from pipeline.base.errors import Failure


def start_ranks(name: str, ranks: int, arguments: Sequence[str], device: str = "cpu") -> None:
    """Run `python -m ARGUMENTS` on so many ranks by torchrun, one thread each.

    Args:
        name: what is measured, for the error.
        ranks: world size.
        arguments: the module and its options.
        device: "cpu" hides the GPUs.

    Raises:
        Failure: with the end of what the ranks wrote, when one of them fails.
    """
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*start, "-m", *arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise Failure(f"{name}: {' '.join(result.stderr.split())[-500:]}")
