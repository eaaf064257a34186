"""Weights on the disk, read one at a time, so that no process needs to hold a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.base.errors import UserError


@dataclass(frozen=True)
class StoredWeight:
    """A weight on the disk.

    Attributes:
        shape: of the whole weight.
        dtype: type of its numbers.
        read: reads it to the CPU, at every call.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredWeight:
        """Wrap a tensor, for example one mapped from a file."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


StoredWeights = Mapping[str, StoredWeight]


class Piece(NamedTuple):
    """Consecutive elements of one parameter in one of this rank's weight tensors.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        offset: first element in the flattened parameter.
        tensor: index of the weight tensor that holds it.
        start: first element in that flattened tensor.
        length: number of elements.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    tensor: int
    start: int
    length: int


@torch.no_grad()
def copy_pieces(weights: StoredWeights, targets: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
    """Copy each piece of `weights` to its place in `targets`; one weight is read at a time.

    Raises:
        UserError: for a weight that is missing or has the wrong shape.
    """
    for piece in pieces:
        weight = weights.get(piece.name)
        if weight is None or weight.shape != piece.shape:
            found = "missing" if weight is None else f"of shape {list(weight.shape)}"
            raise UserError(
                f"the weight {piece.name} to start from is {found}, the model has {list(piece.shape)}: take "
                "another folder, or make the model section fit."
            )
        elements = weight.read().flatten()[piece.offset : piece.offset + piece.length]
        targets[piece.tensor].view(-1)[piece.start : piece.start + piece.length].copy_(elements)


@torch.no_grad()
def squared_norm(weights: Sequence[Tensor], pieces: Sequence[Piece], device: torch.device) -> Tensor:
    """Return the sum of the squares of the elements of `pieces`, [] float64 on `device`.

    Args:
        weights: this rank's weight tensors; padding belongs to no piece.
        pieces: the parameter and range behind each slice of `weights`.
        device: device of the result.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for piece in pieces:
        elements = weights[piece.tensor].view(-1)[piece.start : piece.start + piece.length]
        total += torch.linalg.vector_norm(elements, dtype=torch.float64).square().to(device)
    return total
