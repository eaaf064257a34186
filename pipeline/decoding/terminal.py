"""Sequences on a terminal while they are being filled, redrawn in place."""

from __future__ import annotations

import shutil
import time
import unicodedata
from collections.abc import Iterator
from typing import TextIO

from pipeline.decoding.frames import Cell, Frame

INTERVAL = 0.05  # seconds between two pictures: decoding does not wait for the terminal
MASKED = "░"
RESET, GIVEN, HIDDEN = "\x1b[0m", "\x1b[1m", "\x1b[38;5;240m"
# From green, just filled, to the colour of plain text, in the 256 colours that every terminal has.
AGES = ("\x1b[1;38;5;46m", "\x1b[38;5;40m", "\x1b[38;5;34m", "\x1b[38;5;71m", "\x1b[38;5;108m", "")


class LiveView:
    """The sequences of the current batch, as many as there is room for."""

    def __init__(self, stream: TextIO, colours: bool = True) -> None:
        """Show them on `stream`, a terminal."""
        self.stream = stream
        self.colours = colours
        self.frames: dict[int, Frame] = {}
        self.height = 0  # lines on the screen that are ours
        self.drawn = 0.0

    def show(self, frames: dict[int, Frame]) -> None:
        """Take the frames of a step, and draw them unless the last picture is very young."""
        if not self.frames.keys() & frames.keys():  # the next batch
            self.frames = {}
        self.frames |= frames
        if time.monotonic() - self.drawn >= INTERVAL:
            self.draw()

    def draw(self) -> None:
        """Draw the picture over the last one."""
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
        """Take the picture away: what is printed next stands in its place."""
        if self.height:
            self.stream.write(f"\x1b[{self.height}F\x1b[0J")
        self.height = 0


def wrapped(frame: Frame, width: int, colours: bool) -> list[str]:
    """Return the lines of a frame, none of them wider than `width` columns."""
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
    """Return the escape sequence for a cell: bold where it is given, else by its age in steps."""
    if cell.masked:
        return HIDDEN
    return GIVEN if cell.filled is None else AGES[min(step - cell.filled, len(AGES) - 1)]


def printable(cell: Cell) -> Iterator[str]:
    """Yield the characters of a cell; what would move the cursor is replaced."""
    if cell.masked:
        yield MASKED
    for character in cell.text:
        yield character if character == "\n" or character.isprintable() else "\ufffd"
