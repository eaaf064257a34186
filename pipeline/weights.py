"""Weights on the disk, read one at a time: no process has to hold a whole model to copy or convert it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StoredWeight:
    """A weight that stays on the disk until it is read.

    Attributes:
        shape: of the whole weight.
        read: returns it on the CPU; every call reads it again.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredWeight:
        """Wrap a tensor, such as one mapped from a file."""
        return cls(tuple(tensor.shape), lambda: tensor)


StoredWeights = Mapping[str, StoredWeight]
