"""Programs, and ranks as a launcher starts them, forked from a process that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from support.becoming import become
from support.programs import ROOT, environment_of_ranks, free_ports

GRACE = 10  # seconds between asking the other ranks to end and killing them


class Forking:
    """A process that has imported modules, and forks programs; the first program starts it.

    Args:
        modules: names of the modules.
        variables: added to its environment, which some modules read when they are imported, and to that of
            the programs.
    """

    def __init__(self, modules: str, **variables: str) -> None:
        self.server = forkserver.ForkServer()
        self.server.set_forkserver_preload(["support.forks_python", *modules.split()])
        self.variables = variables

    def start(
        self, command: Sequence[str], environment: dict[str, str], files: Sequence[Path], folder: Path = ROOT
    ) -> BaseProcess:
        """Start ``python COMMAND`` in `folder` and a new session; `files` get its stdout and stderr."""
        environment = environment | self.variables
        paths = os.pathsep.join(filter(None, [str(ROOT / "tests"), environment.get("PYTHONPATH")]))
        process = multiprocessing.get_context("forkserver").Process(
            target=become, args=(command, environment, files, folder)
        )
        with (
            mock.patch.dict(os.environ, environment | {"PYTHONPATH": paths}),
            mock.patch.object(forkserver, "connect_to_new_process", self.server.connect_to_new_process),
        ):
            process.start()
        return process


RANKS = Forking(
    "torch._dynamo torch.utils.tensorboard torch.distributed.launcher.api pipeline.training.start "
    "pipeline.engine.plain pipeline.engine.deepspeed"
)
_MODULES = tempfile.TemporaryDirectory()  # copies of the code of exported folders
LIBRARIES = Forking(
    "transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto "
    "transformers.pipelines transformers.trainer lm_eval.evaluator",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_MODULES_CACHE=_MODULES.name,
)


def run_forked(
    *command: str, ranks: int = 1, timeout: int = 300, folder: Path = ROOT, by: Forking = RANKS
) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` on each of so many ranks; when one fails, the others are ended.

    Programs of Python that it starts, as launchers and benchmarks do, are forked as well.

    Args:
        command: arguments of Python.
        ranks: processes, each with its place in the environment; one has none.
        timeout: seconds.
        folder: where they run.
        by: what they need not import.

    Returns:
        The return code is that of the rank that failed first. The output of the ranks is joined in their
        order.
    """
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    places = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as temporary:
        files = [[Path(temporary, f"{name}_{rank}") for rank in range(ranks)] for name in ("output", "error")]
        processes = [
            by.start(command, environment_of_ranks() | (of_rank if ranks > 1 else {}), paths, folder)
            for of_rank, paths in zip(places, zip(*files, strict=True), strict=True)
        ]
        code = _first_failure(processes, time.monotonic() + timeout)
        return subprocess.CompletedProcess(
            command, code, *("".join(path.read_text() for path in paths) for paths in files)
        )


def start_forked(ranks: int, command: Sequence[str], device: str) -> subprocess.CompletedProcess[str]:
    """Stand in for `start_ranks` of the benchmarks."""
    return run_forked(*command, ranks=ranks)


def torchrun(ranks: int) -> tuple[str, ...]:
    """Return the arguments of Python that start the arguments behind them on several ranks."""
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")


def _first_failure(processes: Sequence[BaseProcess], until: float) -> int:
    """Wait for the end of all; return the first exit code that is not 0, or 0."""
    code, running = 0, list(processes)
    try:
        while running and code == 0:
            assert time.monotonic() < until, "the time limit is over"
            wait([process.sentinel for process in running], 1)
            for process in [each for each in running if not each.is_alive()]:
                running.remove(process)
                code = code or process.exitcode or 0
    finally:
        for end in (BaseProcess.terminate, BaseProcess.kill):
            for process in running:
                end(process)
            for process in running:
                process.join(GRACE)
    return code
