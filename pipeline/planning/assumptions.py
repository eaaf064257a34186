"""What a plan assumes; importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

# What benchmarks/host_time.py measured on a CPU core, a step by its blocks: eager, and with engine.compile.
_HOST_MILLISECONDS = {"plain": (3.1, 1.9), "ZeRO-1 and 2": (3.8, 2.4), "ZeRO-3": (5.9, 3.7)}
UPDATE_BYTES = 40  # that AdamW on a GPU reads and writes per parameter


@dataclass(frozen=True)
class Assumptions:
    """Values that are unknown before the run; every report prints them.

    Attributes:
        efficiency: fraction of peak FLOP/s that matrix products reach when they wait for nothing.
        host_milliseconds: time for the host to launch the kernels of one block for one micro-batch, forward
            and backward; a lower bound on the time of a block.
        update_share: fraction of the memory bandwidth that the update of the weights reaches.
        link_share: fraction of the link bandwidth that collectives reach.
        overlap: fraction of the shorter of computation and communication that the other hides.
        masked_share: mean mask ratio; always 1 for the autoregressive objective.
        reserved_gib: device memory of CUDA, NCCL and the kernels.
        fragmentation: fraction of the device memory that the allocator cannot use.
        host_gigabytes_per_second: bandwidth between a GPU and host memory, for offloaded states.
        disk_gigabytes_per_second: bandwidth of one node to the file system.
    """

    efficiency: float = 0.5
    host_milliseconds: float | None = None  # that of the engine, see below
    update_share: float = 1.0
    link_share: float = 0.7
    overlap: float = 0.8
    masked_share: float = 0.5
    reserved_gib: float = 2.0
    fragmentation: float = 0.05
    host_gigabytes_per_second: float = 20.0
    disk_gigabytes_per_second: float = 2.0


def host_milliseconds(stage: int, compiled: bool) -> float:
    """Return `Assumptions.host_milliseconds` of a ZeRO stage, 0 for the plain engine."""
    kind = "plain" if stage == 0 else "ZeRO-3" if stage == 3 else "ZeRO-1 and 2"
    return _HOST_MILLISECONDS[kind][compiled]
