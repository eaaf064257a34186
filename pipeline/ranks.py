"""Ranks: the place of this process among its peers, and the exchange between them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.base.errors import Failure, UserError

T = TypeVar("T")
_LOST = ("Connection closed by peer", "Connection reset by peer")  # as gloo says it
TIME_LIMIT = timedelta(minutes=10)  # of a collective: torch's own default for NCCL


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Every rank calls the methods that exchange something.

    Attributes:
        rank: index of the process, 0 to world_size - 1.
        world_size: number of processes.
        local_rank: index of the process on its node.
        device: device of the computation.
        sequence_size: consecutive ranks that share their sequences (sequence parallelism).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sequence_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Index of this rank's group, the ranks that train on the same sequences."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """Number of such groups; the global batch is divided among them."""
        return self.world_size // self.sequence_size

    @property
    def backend(self) -> str:
        """The backend of torch.distributed for collectives on `device`."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def connect(self, backend: str | None = None, time_limit: timedelta = TIME_LIMIT) -> None:
        """Join the process group; a single process needs none.

        Args:
            backend: of torch.distributed, instead of that of the device.
            time_limit: longest wait for the other ranks in a collective.
        """
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group(backend or self.backend, timeout=time_limit)

    def disconnect(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def all_gather(self, value: T) -> list[T]:
        """Return the picklable `value` of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum of `values`, of any shape, over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum of `values` over all ranks; NaN need not survive it."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank."""
        return bool(self.max(torch.tensor(int(flag), device=self.device)))

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.world_size == 1:
            return values
        reduced = values.clone()
        dist.all_reduce(reduced, operation)
        return reduced

    def batches(self, count: int, batch_size: int) -> Iterator[range]:
        """Yield this rank's indices of `count` items, as many batches on each rank; some are past the end."""
        for start in range(0, count, batch_size * self.data_size):
            first = start + self.data_rank * batch_size
            yield range(first, first + batch_size)

    def first_problem(self, problem: str | None) -> str | None:
        """Return the problem of the lowest rank that has one, on every rank."""
        return next((each for each in self.all_gather(problem) if each is not None), None)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise a `UserError` of the block on all ranks: they would wait for the failed one forever."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        found = self.first_problem(problem)
        if found is not None:
            raise UserError(found)


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Raise a one-line `Failure` where a collective of the block fails because another rank has ended.

    That rank's own error is the cause, which a stack of every other rank would bury.
    """
    try:
        yield
    except RuntimeError as error:
        sign = next((sign for sign in _LOST if sign in str(error)), None)
        if sign is None:
            raise
        raise Failure(
            f"another rank has ended ({sign}): it failed, and its error is above or in its log, or it was "
            "killed, as for want of memory. The same command resumes from the newest checkpoint."
        ) from error


def join_ranks(device: Literal["auto", "cuda", "cpu"] = "auto", sequence_size: int = 1) -> Ranks:
    """Return this process among its peers, as started by torchrun, the deepspeed launcher or srun.

    Args:
        device: ``engine.device``; auto = a GPU if there is one.
        sequence_size: ``engine.sequence_parallel_size``.

    Raises:
        UserError: when the GPU is missing, a process has none, or ``sequence_size`` does not divide the
            number of ranks.
    """
    rank, world_size, local_rank = join_launch()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "engine.device is 'cuda', but torch sees no GPU: check the driver, or set it to 'cpu'."
        )
    if world_size % sequence_size:
        raise UserError(
            f"engine.sequence_parallel_size is {sequence_size}: it must divide the number of ranks, "
            f"{world_size}."
        )
    place = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        place = torch.device("cuda", _choose_gpu(local_rank))
        torch.cuda.set_device(place)
    return Ranks(rank, world_size, local_rank, place, sequence_size)


def _choose_gpu(local_rank: int) -> int:
    """Return the index of this process's GPU among those it sees."""
    seen = torch.cuda.device_count()
    if seen == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0  # the launcher shows each process its own
    if local_rank >= seen:
        raise UserError(
            f"process {local_rank + 1} of this node has no GPU: torch sees {seen}. Start as many processes a "
            "node as it has GPUs (--nproc_per_node, or --ntasks-per-node with --gpus-per-node), or set "
            "engine.device to 'cpu'."
        )
    return local_rank


def join_launch() -> tuple[int, int, int]:
    """Return rank, world size and local rank from the launcher or srun; 0, 1, 0 without one.

    Sets the environment variables that torch.distributed reads.
    """
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        if "MASTER_ADDR" not in environment:  # slurm/pretrain.sbatch sets it: a container has no scontrol
            environment["MASTER_ADDR"] = _first_host(environment["SLURM_STEP_NODELIST"])
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    environment.setdefault("RANK", "0")
    environment.setdefault("WORLD_SIZE", "1")
    environment.setdefault("LOCAL_RANK", "0")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(free_port())
    return int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"])


def _first_host(node_list: str) -> str:
    ask = ["scontrol", "show", "hostnames", node_list]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError):
        raise UserError(
            f"MASTER_ADDR is not set, and scontrol cannot tell the first node of {node_list}: set "
            "MASTER_ADDR in the job."
        ) from None


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
