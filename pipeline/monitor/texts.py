"""Show texts that the model writes during training, coloured by the order of unmasking."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson

from pipeline.base.files import read_lines
from pipeline.decoding.animation import colour_of, still_picture
from pipeline.decoding.cells import Cell

TEXTS_FILE = "texts.jsonl"


@dataclass(frozen=True)
class ShownText:
    """A text that the model wrote, including the given tokens.

    Attributes:
        step: optimizer step of the model.
        pieces: text of each token.
        order: decoding step, from 0, at which each token was unmasked; None for given tokens.
    """

    step: int
    pieces: list[str]
    order: list[int | None]

    @property
    def steps(self) -> int:
        """The number of decoding steps."""
        return 1 + max((number for number in self.order if number is not None), default=0)

    def tokens(self) -> Iterator[tuple[str, int | None]]:
        """Yield the text and decoding step of each token."""
        return zip(self.pieces, self.order, strict=True)

    def to_json(self) -> bytes:
        """Return the line for RUN/texts.jsonl."""
        return orjson.dumps(asdict(self)) + b"\n"


def read_texts(run_dir: Path) -> list[ShownText]:
    """Return the texts of a run; raise a `UserError` for a damaged line."""
    return [ShownText(**entry) for entry in read_lines(run_dir / TEXTS_FILE)]


def as_html(text: ShownText) -> str:
    """Return the text as HTML; hovering over a token shows its step."""
    spans = []
    for piece, number in text.tokens():
        shown = html.escape(piece)
        if number is not None:
            colour = colour_of(number, text.steps)
            shown = f'<b style="background:{colour}" title="step {number + 1}">{shown}</b>'
        spans.append(shown)
    return f'<p class="text">{"".join(spans)}</p>'


def as_picture(text: ShownText) -> np.ndarray:
    """Return the text as an image [height, width, 3] uint8; characters outside ASCII become boxes."""
    cells = [Cell(piece, number, False) for piece, number in text.tokens()]
    return np.asarray(still_picture(cells, text.steps))


def as_plain(text: ShownText) -> str:
    """Return the text with each part that the model wrote in double brackets."""
    shown, inside = "", False
    for piece, number in text.tokens():
        if (number is not None) != inside:
            shown += "⟧" if inside else "⟦"
            inside = not inside
        shown += piece
    return shown + "⟧" * inside
