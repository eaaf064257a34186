"""Pictures of sequences that are being filled, one after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.sequences import UNFILLED, Sequences


@dataclass(frozen=True)
class Cell:
    """One position of a sequence.

    Attributes:
        text: of its token; empty where it is masked.
        filled: the step at which it was filled; none where it is given, or masked.
        masked: whether it is still masked.
    """

    text: str
    filled: int | None
    masked: bool


@dataclass(frozen=True)
class Frame:
    """A sequence after a step.

    Attributes:
        step: 0 is the first.
        read: makes the cells. That decodes every token, and not every frame is looked at.
    """

    step: int
    read: Callable[[], list[Cell]]

    @cached_property
    def cells(self) -> list[Cell]:
        """The positions of the sequence."""
        return self.read()


def frames_of(now: Sequences, tokenizer: Tokenizer, stop: int | None) -> list[Frame]:
    """Return a frame of each of the sequences `now`, up to a token `stop` that was filled in."""
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
    """Return the text of each token; those between two masks give the text of them all when joined.

    The bytes of a character may be spread over tokens: then the last of them has it.
    """
    found: list[str] = []
    first = done = 0  # text is decoded from `first` on; what comes before `done` has been given
    for i, token in enumerate(tokens):
        if token in (tokenizer.mask, tokenizer.pad, tokenizer.eos):
            found.append("")
            first = done = i + 1
            continue
        text = tokenizer.decode(tokens[first : i + 1])
        goes_on = i + 1 < len(tokens) and tokens[i + 1] != tokenizer.mask
        if text.endswith("\ufffd") and goes_on:  # part of a character
            found.append("")
        else:
            found.append(text[len(tokenizer.decode(tokens[first:done])) :])
            first, done = done, i + 1
    return found


Show = Callable[[dict[int, Frame]], None]
Watch = Callable[[int | None], Callable[[Sequences], None] | None]


def watcher(tokenizer: Tokenizer, shows: Sequence[Show]) -> Watch:
    """Return what `generate` takes to be watched: each of `shows` is given the frames of every step, by the
    numbers of their sequences.
    """

    def watch(stop: int | None) -> Callable[[Sequences], None] | None:
        def on_step(now: Sequences) -> None:
            frames = dict(zip(now.examples.ids.tolist(), frames_of(now, tokenizer, stop), strict=True))
            for show in shows:
                show(frames)

        return on_step if shows else None

    return watch


class Recorder:
    """Keeps all frames of each sequence."""

    def __init__(self) -> None:
        self.frames: dict[int, list[Frame]] = {}

    def show(self, frames: dict[int, Frame]) -> None:
        """Keep the frames of one step."""
        for number, frame in frames.items():
            self.frames.setdefault(number, []).append(frame)

    def sequences(self) -> list[list[Frame]]:
        """Return the frames of each sequence, in order."""
        return [frames for _, frames in sorted(self.frames.items())]
