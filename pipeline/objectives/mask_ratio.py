"""The distribution of the mask ratio: which share of an answer is masked, how often."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskRatio:
    """A uniform or normal distribution, cut off to a range.

    Attributes:
        low: the lowest mask ratio.
        high: the highest mask ratio.
        mean: of the normal distribution before it is cut off.
        std: its standard deviation; None = uniform.
    """

    low: float = 0.0
    high: float = 1.0
    mean: float = 0.5
    std: float | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether every mask ratio from 0 to 1 is equally likely."""
        return self.std is None and (self.low, self.high) == (0.0, 1.0)

    def quantile(self, share: Tensor) -> Tensor:
        """Return the mask ratio below which `share` of the distribution lies, float64; both in [0, 1]."""
        if self.is_uniform:
            return share
        if self.std is None:
            return self.low + share * (self.high - self.low)
        below, above = self._ends(share)
        found = self.mean + self.std * torch.special.ndtri(below + share * (above - below))
        return found.clamp(self.low, self.high)

    def below(self, ratio: Tensor) -> Tensor:
        """Return the share of the distribution below a mask ratio, float64: the inverse of `quantile`."""
        if self.is_uniform:
            return ratio
        ratio = ratio.clamp(self.low, self.high)
        if self.std is None:
            return (ratio - self.low) / (self.high - self.low)
        below, above = self._ends(ratio)
        return (torch.special.ndtr((ratio - self.mean) / self.std) - below) / (above - below)

    def revealed(self, done: Tensor) -> Tensor:
        """Return the unmasked share of an answer after the share `done` of a chain's stages, float64."""
        return done if self.is_uniform else 1.0 - self.quantile(1.0 - done)

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the whole normal distribution below `low` and `high`."""
        assert self.std is not None
        ends = like.new_tensor([self.low, self.high], dtype=torch.float64)
        below, above = torch.special.ndtr((ends - self.mean) / self.std)
        return below, above


UNIFORM = MaskRatio()
