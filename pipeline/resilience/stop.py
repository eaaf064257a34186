"""Whether a run is to stop: asked of any rank, agreed on by all."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.ranks import Ranks


class Stop:
    """A request to stop, by a signal to one rank.

    Attributes:
        requested: says whether this rank was asked.
        agreed: whether a rank was, as of the last exchange: of the guard at a step, or of `ask`.
    """

    def __init__(self, ranks: Ranks, requested: Callable[[], bool]) -> None:
        self.ranks = ranks
        self.requested = requested
        self.agreed = False

    def ask(self) -> bool:
        """Exchange, and return whether the run is to stop; every rank calls this."""
        received = torch.tensor([float(self.requested())], device=self.ranks.device)
        self.agreed = self.agreed or bool(self.ranks.max(received))
        return self.agreed
