"""Call a function on several ranks of this machine, for a benchmark."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pipeline.base.cli import run
from pipeline.base.errors import Failure

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
LAUNCHER_LOG = " failed (exitcode: "  # torchrun's own report of a dead rank follows what the ranks wrote
CALL, RESULT = "call.pickle", "result.pickle"
T = TypeVar("T")


def on_ranks(ranks: int, measure: Callable[..., T], *arguments: Any, device: str = "cpu") -> T:
    """Call ``measure(*arguments)`` on so many ranks, and return what it returns on the first.

    Args:
        ranks: world size.
        measure: a function of a benchmark.
        arguments: values that pickle.
        device: "cpu" hides the GPUs.

    Raises:
        Failure: with the end of what the ranks wrote, when one of them fails.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = sys.modules[measure.__module__].__spec__  # names the module also when it is __main__
        assert spec is not None
        (folder / CALL).write_bytes(pickle.dumps((spec.name, measure.__name__, arguments)))
        result = start_ranks(ranks, ["-m", "benchmarks.ranks", str(folder)], device)
        if result.returncode:
            called = f"{measure.__name__}({', '.join(map(str, arguments))})"
            wrote, _, _ = result.stderr.partition(LAUNCHER_LOG)
            raise Failure(f"{called} on {ranks} ranks: {' '.join(wrote.split())[-500:]}")
        found: T = pickle.loads((folder / RESULT).read_bytes())
    return found


def start_ranks(ranks: int, command: Sequence[str], device: str) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` on so many ranks by torchrun, one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, *TORCHRUN, str(ranks), *command]
    return subprocess.run(start, env=environment, capture_output=True, text=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Be one of the ranks of `on_ranks`."""
    folder = Path((sys.argv[1:] if arguments is None else arguments)[0])
    module, name, given = pickle.loads((folder / CALL).read_bytes())
    found = getattr(importlib.import_module(module), name)(*given)
    if os.environ["RANK"] == "0":
        (folder / RESULT).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    run(main, of_ranks=True)
