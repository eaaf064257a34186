"""Examples: what the data side hands to the objectives, one clean sequence per slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.arrays import Array as Array

PADDING, PROMPT, ANSWER = 0, 1, 2


class ExampleDataset(Protocol):
    """A map-style dataset of {"tokens": [L] int64, "roles": [L] int8}.

    Also "documents" [L] int32 and "source" int, where `Examples` has them.
    """

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
        documents: [B, L] int32, the document of each position, counted from 0 in each row; positions of
            different documents do not see each other. None = an example is one document.
        sources: [B] int64, the dataset of each example, by its place among all prefixes; None = only one.
    """

    tokens: Tensor
    roles: Tensor
    ids: Tensor
    documents: Tensor | None = None
    sources: Tensor | None = None

    @property
    def answer(self) -> Tensor:
        """[B, L] bool: the positions that may be masked."""
        return self.roles == ANSWER

    @property
    def answer_length(self) -> Tensor:
        """[B] int64: L_eff."""
        return self.answer.sum(dim=1)

    @property
    def starts(self) -> Tensor:
        """[B, L] bool: the first position of each document."""
        starts = torch.zeros_like(self.roles, dtype=torch.bool)
        starts[:, 0] = True
        if self.documents is not None:
            starts[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return starts

    def mapped(self, change: Callable[..., Tensor], *others: Examples) -> Examples:
        """Return the examples with every tensor changed; `change` also gets the same one of `others`."""
        fields = zip(*(examples._tensors for examples in (self, *others)), strict=True)
        changed: list[Any] = [None if tensors[0] is None else change(*tensors) for tensors in fields]
        return Examples(*changed)

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        """The attributes in order; torch 2.11 does not compile `vars`."""
        return self.tokens, self.roles, self.ids, self.documents, self.sources

    def replaced(self, where: Tensor, other: Examples) -> Examples:
        """Return the examples with rows `where` [B] bool taken from `other`."""
        rows = where[:, None]
        return self.mapped(lambda own, new: torch.where(rows if own.ndim == 2 else where, new, own), other)

    def to(self, device: torch.device) -> Examples:
        """Return the examples on `device`; a copy to a GPU is asynchronous."""
        on_gpu = device.type == "cuda"
        return self.mapped(lambda x: (x.pin_memory() if on_gpu else x).to(device, non_blocking=True))


def stack_examples(rows: Sequence[dict[str, Array]], ids: Sequence[int]) -> Examples:
    """Stack rows of a dataset into tensors on the CPU, with these ids."""

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([row[name] for row in rows]))

    return Examples(
        stacked("tokens").long(),
        stacked("roles"),
        torch.tensor(ids, dtype=torch.int64),
        stacked("documents") if "documents" in rows[0] else None,
        stacked("source") if "source" in rows[0] else None,
    )
