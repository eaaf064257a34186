"""Ranks: who this process is among its peers, and what the processes tell each other."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.base.errors import UserError

T = TypeVar("T")
TIME_LIMIT = timedelta(minutes=10)  # of a collective: torch's own default for NCCL


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Every rank calls each method that exchanges something.

    Attributes:
        rank: number of the process, 0 to world_size - 1.
        world_size: processes in all.
        local_rank: number of the process on its node.
        device: where it computes.
        sequence_size: consecutive ranks that share their sequences (sequence parallelism).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sequence_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks, and writes, for all."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Number of the group of ranks that trains on the same sequences."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """How many such groups there are: the global batch is divided among them."""
        return self.world_size // self.sequence_size

    def connect(self, backend: str | None = None, time_limit: timedelta = TIME_LIMIT) -> None:
        """Join the process group; a process alone needs none.

        Args:
            backend: of torch.distributed; by default NCCL on GPUs, gloo otherwise.
            time_limit: seconds that a rank waits for the others in a collective.
        """
        if self.world_size > 1 and not dist.is_initialized():
            backend = backend or ("nccl" if self.device.type == "cuda" else "gloo")
            dist.init_process_group(backend, timeout=time_limit)

    def disconnect(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until every rank has come here."""
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

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.world_size == 1:
            return values
        reduced = values.clone()
        dist.all_reduce(reduced, operation)
        return reduced

    def first_problem(self, problem: str | None) -> str | None:
        """Return the problem of the lowest rank that has one."""
        return next((each for each in self.all_gather(problem) if each is not None), None)

    def agree(self, problem: str | None) -> None:
        """Raise a `UserError` on every rank when `problem` is not None on one.

        What one rank alone finds wrong must stop all of them: the others would wait for it for ever.
        """
        found = self.first_problem(problem)
        if found is not None:
            raise UserError(found)


def join_ranks(device: Literal["auto", "cuda", "cpu"] = "auto", sequence_size: int = 1) -> Ranks:
    """Return this process among its peers, as torchrun, the deepspeed launcher or srun started it.

    Args:
        device: ``engine.device``; auto = a GPU where there is one.
        sequence_size: ``engine.sequence_parallel_size``.

    Raises:
        UserError: when a GPU is asked for and there is none, or the ranks cannot be grouped.
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
        # A task of srun may see its own GPU alone.
        place = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    return Ranks(rank, world_size, local_rank, place, sequence_size)


def join_launch() -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on the node, set by a launcher or srun; alone otherwise.

    Fills in the environment variables that torch.distributed reads.
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
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
