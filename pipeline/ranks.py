"""Where a process runs: its place among its peers, its device, its precision."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.base.errors import UserError
from pipeline.config import Config


@dataclass(frozen=True)
class Launch:
    """This process among its peers.

    Attributes:
        rank: number of the process, 0 to world_size - 1.
        world_size: processes in all.
        local_rank: number of the process on its node.
        device: where it computes.
        precision: of weights and activations in the forward and backward; the optimizer's state is fp32.
        sequence_size: consecutive ranks that share their sequences (sequence parallelism).
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    precision: Literal["fp32", "bf16"]
    sequence_size: int = 1

    @property
    def data_rank(self) -> int:
        """Number of the group of ranks that trains on the same sequences."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """How many such groups there are: among them the global batch is divided."""
        return self.world_size // self.sequence_size


def read_launch(config: Config) -> Launch:
    """Return the facts of this process, set by torchrun, the deepspeed launcher or srun (`join_launch`).

    Raises:
        UserError: when a GPU is asked for and there is none, or the ranks cannot be grouped.
    """
    rank, world_size, local_rank = join_launch()
    wanted = config.engine.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "engine.device is 'cuda', but torch sees no GPU: check the driver, or set it to 'cpu'."
        )
    on_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(local_rank)
    sequence_size = config.engine.sequence_parallel_size
    if world_size % sequence_size:
        raise UserError(
            f"engine.sequence_parallel_size is {sequence_size}: it must divide the number of ranks, "
            f"{world_size}."
        )
    precision = config.engine.precision
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
        precision=("bf16" if on_gpu else "fp32") if precision == "auto" else precision,
        sequence_size=sequence_size,
    )


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
