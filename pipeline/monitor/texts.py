"""What the model writes while it is trained, coloured by the order in which its tokens were unmasked."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson

from pipeline.base.files import read_lines
from pipeline.decoding.animation import colour_of, still_picture
from pipeline.decoding.frames import Cell

TEXTS_FILE = "texts.jsonl"


@dataclass(frozen=True)
class ShownText:
    """A text that the model wrote, or the part of one that follows what is given.

    Attributes:
        step: optimizer step of the model.
        pieces: the text of each token.
        order: the decoding step, from 0, at which each was unmasked; None where it is given.
    """

    step: int
    pieces: list[str]
    order: list[int | None]

    @property
    def steps(self) -> int:
        """How many decoding steps there were."""
        return 1 + max((number for number in self.order if number is not None), default=0)

    def tokens(self) -> Iterator[tuple[str, int | None]]:
        """Yield text and decoding step of each token."""
        return zip(self.pieces, self.order, strict=True)

    def to_json(self) -> bytes:
        """Return a line of RUN/texts.jsonl."""
        return orjson.dumps(asdict(self)) + b"\n"


def read_texts(run_dir: Path) -> list[ShownText]:
    """Return the texts of a run; raise a `UserError` for a damaged line."""
    return [ShownText(**entry) for entry in read_lines(run_dir / TEXTS_FILE)]


def as_html(text: ShownText) -> str:
    """Return the text for an HTML page; pointing at a token shows its step."""
    spans = []
    for piece, number in text.tokens():
        shown = html.escape(piece)
        if number is not None:
            colour = colour_of(number, text.steps)
            shown = f'<b style="background:{colour}" title="step {number + 1}">{shown}</b>'
        spans.append(shown)
    return f'<p class="text">{"".join(spans)}</p>'


def as_picture(text: ShownText) -> np.ndarray:
    """Return the text as a picture [height, width, 3] uint8; letters beyond ASCII become boxes."""
    cells = [Cell(piece, number, False) for piece, number in text.tokens()]
    return np.asarray(still_picture(cells, text.steps))


def as_plain(text: ShownText) -> str:
    """Return the text with each written part in double brackets."""
    shown, inside = "", False
    for piece, number in text.tokens():
        if (number is not None) != inside:
            shown += "⟧" if inside else "⟦"
            inside = not inside
        shown += piece
    return shown + "⟧" * inside
