"""What is shown of a sequence after a decoding step; importing this needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Cell:
    """One position of a sequence.

    Attributes:
        text: text of the token; empty if masked.
        filled: the step at which it was filled; None if given or masked.
        masked: whether it is still masked.
    """

    text: str
    filled: int | None
    masked: bool


@dataclass(frozen=True)
class Frame:
    """A sequence after a step.

    Attributes:
        step: the step, counted from 0.
        read: returns the cells. It decodes every token, so it runs only for frames that are shown.
    """

    step: int
    read: Callable[[], list[Cell]]

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells of the sequence, one per position."""
        return self.read()


Show = Callable[[dict[int, Frame]], None]
