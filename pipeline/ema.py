"""The exponential moving average of the weights, sharded as the weights are: nothing is gathered.

Each rank averages the fp32 elements that its optimizer updates, and saves them under the parameter's name
with their place in it, so an average can be read at any world size and by any engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.cli import UserError

FILES = "ema_*.safetensors"


class Piece(NamedTuple):
    """Consecutive elements of one parameter in one of this rank's weight tensors.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        offset: first element, counted in the flattened parameter.
        tensor: number of the weight tensor that holds it.
        start: first element, counted in that flattened tensor.
        length: how many elements.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    tensor: int
    start: int
    length: int


class WeightAverage:
    """average <- d x average + (1 - d) x weights after every update, with d rising to its final value.

    d = min(decay, (1 + n) / (10 + n)) after n earlier updates, as in the score-based diffusion codes (Song et
    al. 2021, arXiv 2011.13456): at a plain 0.9999 the initial weights would still be 90% of the average after
    1,000 steps.
    """

    def __init__(self, decay: float, weights: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
        """Begin the average at the present weights.

        Args:
            decay: final d, between 0 and 1.
            weights: this rank's fp32 weights, updated in place by the optimizer, of any shape.
            pieces: what of which parameter is in them.
        """
        self.decay = decay
        self.weights = [weight.detach() for weight in weights]
        self.pieces = {piece.name: piece for piece in pieces if piece.length}
        self.restart()

    def restart(self) -> None:
        """Begin at the present weights."""
        self.updates = 0
        self.average = [weight.clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap weights and average in place; a second call puts both back, bit for bit."""
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

    def metadata(self) -> dict[str, str]:
        """Return what a file of the average says of itself."""
        pieces = {name: [piece.offset, list(piece.shape)] for name, piece in self.pieces.items()}
        return {"updates": str(self.updates), "pieces": json.dumps(pieces)}

    def save(self, folder: Path, rank: int) -> None:
        """Write this rank's part into `folder`."""
        save_file(self.state(), file_of_rank(folder, rank), self.metadata())

    @torch.no_grad()
    def load(self, folder: Path, rank: int) -> None:
        """Read this rank's part of what any number of ranks wrote; begin anew where there is no average.

        Raises:
            UserError: when a file is damaged or missing.
        """
        paths = sorted(folder.glob(FILES))
        if not paths:
            self.restart()
            return
        with _Files(paths[rank : rank + 1]) as files:  # at the same world size that is all of it
            if files.hold(self.pieces):
                return self._read(files)
        with _Files(paths) as files:
            self._read(files)

    def _read(self, files: _Files) -> None:
        for name, target in self.state().items():
            target.copy_(files.read(name, self.pieces[name].offset, len(target)))
        self.updates = files.updates


def file_of_rank(folder: Path, rank: int) -> Path:
    """Return the path of a rank's part."""
    return folder / FILES.replace("*", f"{rank:05d}")


def has_average(folder: Path) -> bool:
    """Say whether an engine saved an average in `folder`."""
    return any(folder.glob(FILES))


def read_average(folder: Path) -> dict[str, Tensor]:
    """Return the averaged fp32 weights by name that an engine saved in `folder`, on the CPU.

    Raises:
        UserError: when a file is damaged or missing.
    """
    with _Files(sorted(folder.glob(FILES))) as files:
        return {
            name: files.read(name, 0, torch.Size(shape).numel()).view(shape)
            for name, shape in files.shapes.items()
        }


class _Files:
    """Open files of an average, read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.where = paths[0].parent if paths else Path()
        self.stack = ExitStack()
        self.updates = 0
        self.shapes: dict[str, list[int]] = {}
        self.found: dict[str, list[tuple[int, Any]]] = {}  # (offset, slice) by parameter
        for path in paths:
            try:
                file = self.stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}): go on from an older checkpoint.") from None
            self.updates = int(file.metadata()["updates"])
            for name, (offset, shape) in json.loads(file.metadata()["pieces"]).items():
                self.shapes[name] = shape
                self.found.setdefault(name, []).append((offset, file.get_slice(name)))

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def hold(self, pieces: Mapping[str, Piece]) -> bool:
        """Say whether these files have every piece as it is asked for."""
        return all(
            [(offset, piece.get_shape()[0]) for offset, piece in self.found.get(name, [])]
            == [(wanted.offset, wanted.length)]
            for name, wanted in pieces.items()
        )

    def read(self, name: str, offset: int, count: int) -> Tensor:
        """Return `count` elements [count] of a parameter from `offset` on."""
        parts = []
        for first, piece in sorted(self.found.get(name, []), key=lambda item: item[0]):
            begin = max(offset - first, 0)
            end = min(offset + count - first, piece.get_shape()[0])
            if begin < end:
                parts.append(piece[begin:end])
        elements = torch.cat(parts) if parts else torch.empty(0)
        if len(elements) != count:
            raise UserError(
                f"{self.where} holds {len(elements)} of {count} averaged elements of {name}: a file "
                f"{FILES} is missing, or of another model. Go on from an older checkpoint."
            )
        return elements
