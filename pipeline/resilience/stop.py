"""A stop request to any rank, agreed on by all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.ranks import Ranks


class Stop:
    """A request to stop the run, by a signal to one or more ranks.

    Attributes:
        requested: returns whether this rank was signalled.
        agreed: whether any rank was, as of the last exchange: the guard's at a step, or `ask`.
    """

    def __init__(self, ranks: Ranks, requested: Callable[[], bool]) -> None:
        self.ranks = ranks
        self.requested = requested
        self.agreed = False

    def ask(self) -> bool:
        """Return whether any rank was asked to stop; every rank calls this."""
        received = torch.tensor([float(self.requested())], device=self.ranks.device)
        self.agreed = self.agreed or bool(self.ranks.max(received))
        return self.agreed
