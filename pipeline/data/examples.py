"""Examples: what the data side hands to the objectives, one clean sequence per slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.arrays import Array as Array

PADDING, PROMPT, ANSWER = 0, 1, 2


class ExampleDataset(Protocol):
    """A map-style dataset of {"tokens": [L] int64, "roles": [L] int8}."""

    def __len__(self) -> int:
        """Return the number of examples in one epoch."""

    def __getitem__(self, index: int) -> dict[str, Array]:
        """Return an example; several threads may call this."""


@dataclass
class Examples:
    """One clean sequence for each of B slots.

    Attributes:
        tokens: [B, L] int64, x0.
        roles: [B, L] int8, PADDING, PROMPT or ANSWER; each row has at least one ANSWER.
        ids: [B] int64, unique for each example and epoch; they seed the noise.
    """

    tokens: Tensor
    roles: Tensor
    ids: Tensor

    @property
    def answer(self) -> Tensor:
        """[B, L] bool: the positions that may be masked."""
        return self.roles == ANSWER

    @property
    def answer_length(self) -> Tensor:
        """[B] int64: L_eff."""
        return self.answer.sum(dim=1)

    def replaced(self, where: Tensor, other: Examples) -> Examples:
        """Return the examples with rows `where` [B] bool taken from `other`."""
        rows = where[:, None]
        return Examples(
            torch.where(rows, other.tokens, self.tokens),
            torch.where(rows, other.roles, self.roles),
            torch.where(where, other.ids, self.ids),
        )

    def to(self, device: torch.device) -> Examples:
        """Return the examples on `device`; a copy to a GPU is asynchronous."""
        tensors = [x.pin_memory() if device.type == "cuda" else x for x in vars(self).values()]
        return Examples(*(x.to(device, non_blocking=True) for x in tensors))


def stack_examples(rows: Sequence[dict[str, Array]], ids: Sequence[int]) -> Examples:
    """Stack rows of a dataset into tensors on the CPU, with these ids."""
    return Examples(
        torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64)),
        torch.from_numpy(np.stack([row["roles"] for row in rows])),
        torch.tensor(ids, dtype=torch.int64),
    )
