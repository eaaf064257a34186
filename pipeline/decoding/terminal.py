"""Live view of decoding on a terminal."""

from __future__ import annotations

import shutil
import time
import unicodedata
from collections.abc import Iterator
from typing import TextIO

from pipeline.decoding.cells import Cell, Frame

INTERVAL = 0.05  # minimum seconds between redraws, so that decoding does not wait for the terminal
MASKED = "░"
RESET, GIVEN, HIDDEN = "\x1b[0m", "\x1b[1m", "\x1b[38;5;240m"
# From green (just filled) to plain text, in the 256 colours that every terminal has.
AGES = ("\x1b[1;38;5;46m", "\x1b[38;5;40m", "\x1b[38;5;34m", "\x1b[38;5;71m", "\x1b[38;5;108m", "")


class LiveView:
    """The sequences of the current batch, redrawn in place, as many as fit on the screen."""

    def __init__(self, stream: TextIO, colours: bool = True) -> None:
        """Draw on `stream`, a terminal."""
        self.stream = stream
        self.colours = colours
        self.frames: dict[int, Frame] = {}
        self.height = 0  # lines drawn on the screen
        self.drawn = 0.0

    def show(self, frames: dict[int, Frame]) -> None:
        """Store the frames of a step; redraw unless the last redraw was less than `INTERVAL` ago."""
        if not self.frames.keys() & frames.keys():  # the next batch
            self.frames = {}
        self.frames |= frames
        if time.monotonic() - self.drawn >= INTERVAL:
            self.draw()

    def draw(self) -> None:
        """Redraw over the last picture."""
        size = shutil.get_terminal_size()
        lines: list[str] = []
        for _, frame in sorted(self.frames.items()):
            lines += wrapped(frame, size.columns - 1, self.colours)
        lines = lines[: max(1, size.lines - 1)]
        self.clear()
        self.stream.write("\n".join(lines) + "\n")
        self.stream.flush()
        self.height, self.drawn = len(lines), time.monotonic()

    def clear(self) -> None:
        """Erase the picture; the next output replaces it."""
        if self.height:
            self.stream.write(f"\x1b[{self.height}F\x1b[0J")
        self.height = 0


def wrapped(frame: Frame, width: int, colours: bool) -> list[str]:
    """Wrap a frame into lines of at most `width` columns."""
    lines, column = [""], 0
    for cell in frame.cells:
        style = style_of(cell, frame.step) if colours else ""
        for character in printable(cell):
            size = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if character == "\n" or column + size > width:
                lines.append("")
                column = 0
            if character != "\n":
                lines[-1] += f"{style}{character}{RESET}" if style else character
                column += size
    return lines


def style_of(cell: Cell, step: int) -> str:
    """Return the escape sequence of a cell: grey if masked, bold if given, else by its age in steps."""
    if cell.masked:
        return HIDDEN
    return GIVEN if cell.filled is None else AGES[min(step - cell.filled, len(AGES) - 1)]


def printable(cell: Cell) -> Iterator[str]:
    """Yield the characters of a cell; replace control characters."""
    if cell.masked:
        yield MASKED
    for character in cell.text:
        yield character if character == "\n" or character.isprintable() else "\ufffd"
