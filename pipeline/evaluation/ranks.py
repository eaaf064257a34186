"""The processes of an evaluation: each has the whole model, and the items are dealt among them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch

from pipeline.ranks import join_launch

T = TypeVar("T")


class Ranks:
    """This process among its peers, started by torchrun or srun; alone otherwise.

    Attributes:
        rank: number of the process.
        size: how many there are.
        device: where it computes: on its GPU, where there is one.
    """

    def __init__(self) -> None:
        """Join the others."""
        self.rank, self.size, local_rank = join_launch()
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
        if self.size > 1:  # nobody is slow by days
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))

    def all_gather(self, value: T) -> list[T]:
        """Return the picklable `value` of every rank, in rank order."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            torch.distributed.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leave the others."""
        if self.size > 1:
            torch.distributed.destroy_process_group()
