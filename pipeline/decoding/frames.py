"""Frames: the state of each sequence after each decoding step, for display."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.cells import Cell, Frame, Show
from pipeline.decoding.sequences import UNFILLED, Sequences


def frames_of(now: Sequences, tokenizer: Tokenizer, stop: int | None) -> list[Frame]:
    """Return a frame of each sequence, up to the first filled `stop` token."""
    found = []
    columns = (now.examples.tokens, now.masked, now.order, now.present)
    for tokens, masked, order, present in zip(*(x.tolist() for x in columns), strict=True):
        end = sum(present)
        ends = [i for i in range(end) if tokens[i] == stop and order[i] != UNFILLED]
        end = min([end, *(i + 1 for i in ends)])
        shown = [tokenizer.mask if masked[i] else tokens[i] for i in range(end)]
        found.append(Frame(now.step - 1, partial(_cells, tokenizer, shown, order[:end])))
    return found


def _cells(tokenizer: Tokenizer, tokens: list[int], order: list[int]) -> list[Cell]:
    return [
        Cell(text, None if step == UNFILLED else step, token == tokenizer.mask)
        for text, step, token in zip(pieces(tokenizer, tokens), order, tokens, strict=True)
    ]


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token; joined, the texts between two masks equal the decoded text.

    If a character is split into several tokens, the last of them gets it.
    """
    found: list[str] = []
    first = done = 0  # decode from `first`; tokens before `done` already have their text
    for i, token in enumerate(tokens):
        if token in (tokenizer.mask, tokenizer.pad, tokenizer.eos):
            found.append("")
            first = done = i + 1
            continue
        text = tokenizer.decode(tokens[first : i + 1])
        continues = i + 1 < len(tokens) and tokens[i + 1] != tokenizer.mask
        if text.endswith("\ufffd") and continues:  # part of a character
            found.append("")
        else:
            found.append(text[len(tokenizer.decode(tokens[first:done])) :])
            first, done = done, i + 1
    return found


def show_step(tokenizer: Tokenizer, stop: int | None, shows: Sequence[Show], now: Sequences) -> None:
    """Pass the frames of a step, by id, to `shows`; see `frames_of`."""
    frames = dict(zip(now.examples.ids.tolist(), frames_of(now, tokenizer, stop), strict=True))
    for show in shows:
        show(frames)


class Recorder:
    """Record all frames of each sequence."""

    def __init__(self) -> None:
        self.frames: dict[int, list[Frame]] = {}

    def show(self, frames: dict[int, Frame]) -> None:
        """Record the frames of one step."""
        for number, frame in frames.items():
            self.frames.setdefault(number, []).append(frame)

    def sequences(self) -> list[list[Frame]]:
        """Return the frames of each sequence, in order."""
        return [frames for _, frames in sorted(self.frames.items())]
