"""Exponential moving average (EMA) of the weights, sharded like the weights: nothing is gathered.

Each rank averages the fp32 elements that its optimizer updates, and saves them by parameter name and offset.
So an average can be read at any world size and by any engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.engine.tensor_files import read_tensors, taking
from pipeline.engine.weights import Piece, StoredWeight, StoredWeights

FILES = "ema_*.pt"


class WeightAverage:
    """average <- d x average + (1 - d) x weights after every update.

    d = min(decay, (1 + n) / (10 + n)) after n earlier updates, as in the code of Song et al. 2021 (arXiv
    2011.13456). With a constant 0.9999, the initial weights would still be 90% of the average after 1,000
    steps.
    """

    def __init__(self, decay: float, weights: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
        """Begin the average at the current weights.

        Args:
            decay: final d, between 0 and 1.
            weights: this rank's fp32 weights, of any shape; the optimizer updates them in place.
            pieces: the parameter and range behind each slice of `weights`.
        """
        self.decay = decay
        self.weights = [weight.detach() for weight in weights]
        self.pieces = {piece.name: piece for piece in pieces if piece.length}
        self.restart()

    def restart(self) -> None:
        """Begin again at the current weights."""
        self.updates = 0
        self.average = [weight.clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights of one more step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap weights and average in place; a second call restores both bit for bit."""
        for weight, average in zip(self.weights, self.average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """Return this rank's part of the average by parameter name: views [length], no copies."""
        return {
            name: self.average[piece.tensor].view(-1)[piece.start : piece.start + piece.length]
            for name, piece in self.pieces.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the average as `torch.save` writes it: views, no copies."""
        pieces = {
            name: {"shape": list(piece.shape), "offset": piece.offset, "elements": elements}
            for (name, elements), piece in zip(self.state().items(), self.pieces.values(), strict=True)
        }
        return {"updates": self.updates, "pieces": pieces}

    @torch.no_grad()
    def load(self, folder: Path, rank: int) -> None:
        """Read this rank's part from the files of any number of ranks; without files, begin again.

        Raises:
            UserError: when a file is damaged or missing.
        """
        paths = sorted(folder.glob(FILES))
        if not paths:
            self.restart()
            return
        files = _Files(paths[rank : rank + 1])
        if not files.hold(self.pieces):  # another world size or ZeRO stage wrote them
            files = _Files(paths)
        for name, target in self.state().items():
            target.copy_(files.read(name, self.pieces[name].offset, len(target)))
        self.updates = files.updates


def file_name(rank: int) -> str:
    """Return the name of the file with a rank's part."""
    return FILES.replace("*", f"{rank:05d}")


def has_average(folder: Path) -> bool:
    """Return whether `folder` holds an average that an engine saved."""
    return any(folder.glob(FILES))


def open_average(folder: Path) -> StoredWeights:
    """Return the averaged fp32 weights by name that an engine saved in `folder`; nothing is read yet.

    Raises:
        UserError: when a file is damaged or missing, at the latest when a weight is read.
    """
    files = _Files(sorted(folder.glob(FILES)))

    def stored(name: str, shape: tuple[int, ...]) -> StoredWeight:
        return StoredWeight(shape, torch.float32, lambda: files.read(name, 0, math.prod(shape)).view(shape))

    return {name: stored(name, tuple(shape)) for name, shape in files.shapes.items()}


class _Files:
    """The files of an average, read as one; elements are read only when needed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.updates = 0
        self.shapes: dict[str, list[int]] = {}
        self.found: dict[str, list[tuple[int, Tensor]]] = {}  # (offset, elements) by parameter
        for path in paths:
            state = read_tensors(path, ("updates", "pieces"))
            self.updates = state["updates"]
            with taking(path):
                for name, piece in state["pieces"].items():
                    self.shapes[name] = piece["shape"]
                    self.found.setdefault(name, []).append((piece["offset"], piece["elements"]))

    def hold(self, pieces: Mapping[str, Piece]) -> bool:
        """Return whether these files hold exactly `pieces`."""
        return all(
            [(offset, len(elements)) for offset, elements in self.found.get(name, [])]
            == [(wanted.offset, wanted.length)]
            for name, wanted in pieces.items()
        )

    def read(self, name: str, offset: int, count: int) -> Tensor:
        """Return `count` elements [count] of a parameter from `offset` on."""
        parts = []
        for first, piece in sorted(self.found.get(name, []), key=lambda item: item[0]):
            begin, end = max(offset - first, 0), min(offset + count - first, len(piece))
            if begin < end:
                parts.append(piece[begin:end])
        elements = torch.cat(parts) if parts else torch.empty(0)
        if len(elements) != count:
            raise UserError(
                f"{self.paths[0].parent} holds {len(elements)} of {count} averaged elements of {name}: a "
                f"file {FILES} is missing, or of another model. Resume from an older checkpoint."
            )
        return elements
