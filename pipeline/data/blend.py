"""How much each dataset gives to a blend, and building its indices once, whole, and by one rank a node."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.base.files import creating_folder, remove_left_overs, replacing

ORDER_FILE = "data_order.json"


@dataclass(frozen=True)
class Share:
    """What a dataset gives to an epoch of the blend.

    Attributes:
        prefix: the dataset.
        tokens: in all of it.
        examples: training examples of one epoch of its own.
        used: training examples in an epoch of the blend.
        too_long: training documents left out by data.too_long: drop.
    """

    prefix: str
    tokens: int
    examples: int
    used: int
    too_long: int = 0

    @property
    def epochs(self) -> float:
        """How often each of its examples comes in an epoch of the blend, on average."""
        return self.used / self.examples


def blend_sizes(examples: Sequence[int], weights: Sequence[float], caps: Sequence[float] | None) -> list[int]:
    """Return how many examples of each dataset an epoch of the blend holds.

    It is as long as the datasets together, shared by `weights`. What a dataset may not give, because it would
    come more than `caps` times, the others give in the proportion of their weights; where none may give more,
    the epoch is shorter.

    Args:
        examples: examples of each dataset, once.
        weights: shares, of any sum.
        caps: most epochs of each dataset; None for no limit.
    """
    limits = (
        [float("inf")] * len(examples)
        if caps is None
        else [c * n for c, n in zip(caps, examples, strict=True)]
    )
    given: dict[int, float] = {}
    while True:
        free = [i for i in range(len(examples)) if i not in given]
        scale = (sum(examples) - sum(given.values())) / (sum(weights[i] for i in free) or 1)
        over = [i for i in free if weights[i] * scale > limits[i]]
        if not over:
            given |= {i: weights[i] * scale for i in free}
            return [max(1, int(given[i] + 1e-6)) for i in range(len(examples))]
        given |= {i: limits[i] for i in over}


def build_once(folder: Path, build: Callable[[Path], object]) -> None:
    """Have `folder` made by `build` where it is missing; every rank calls this.

    The first rank builds, and then, where its folder cannot be seen (a disk of the node's own), one rank of
    each node. The folder appears whole, by a rename, so a killed build leaves none, and nodes that build the
    same at the same time on a shared file system do no harm.
    """
    distributed = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    for is_builder in (rank == 0, os.environ.get("LOCAL_RANK", "0") == "0"):
        if is_builder and not folder.exists():
            if rank == 0:
                remove_left_overs(folder)
            with creating_folder(folder) as writing, as_if_alone():
                build(writing)
        if distributed:
            torch.distributed.barrier()


@contextlib.contextmanager
def as_if_alone() -> Iterator[None]:
    """Let megatron-core build or load as a single process would.

    By itself it builds on the global rank 0 only, with barriers that every rank must meet: then no rank of
    another node could build on its own disk, and none could load alone.
    """
    names = {"is_initialized": lambda: False, "get_rank": lambda group=None: 0}
    before = {name: getattr(torch.distributed, name) for name in names}
    for name, function in names.items():
        setattr(torch.distributed, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch.distributed, name, function)


def write_order(folder: Path, shares: Sequence[Share], fingerprint: str) -> None:
    """Write what the blend is made of into the run folder."""
    values = {
        "fingerprint": fingerprint,
        "datasets": [dataclasses.asdict(s) | {"epochs": s.epochs} for s in shares],
    }
    with replacing(folder / ORDER_FILE) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")


def describe_order(shares: Sequence[Share]) -> str:
    """Return the blend as lines for people."""
    total = sum(share.used for share in shares)
    lines = [f"an epoch: {total:,} training examples"]
    for share in shares:
        lines.append(
            f"  {share.prefix}: {share.used:,} ({share.used / total:.1%}), {share.epochs:.2f} epochs of "
            f"{share.examples:,} examples, {share.tokens:,} tokens"
        )
        if share.too_long:
            among = f"{share.too_long:,} of {share.examples + share.too_long:,} documents"
            lines.append(f"    left out, longer than data.sequence_length: {among}")
    return "\n".join(lines)
