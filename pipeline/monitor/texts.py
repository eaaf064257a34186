"""What the model writes while it is trained, coloured by the order in which its tokens were unmasked."""

from __future__ import annotations

import colorsys
import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson
from PIL import Image, ImageDraw, ImageFont

from pipeline.files import read_lines

TEXTS_FILE = "texts.jsonl"
_WIDTH, _LINE, _SIZE, _MARGIN = 480, 24, 14, 8  # pixels
_FIRST_HUE, _LAST_HUE = 0.58, 0.04  # blue is unmasked first, red last


@dataclass(frozen=True)
class ShownText:
    """A text that the model wrote.

    Attributes:
        step: optimizer step of the model.
        given: what stands before.
        pieces: the text of each token that the model filled in.
        order: the decoding step, from 0, at which each was unmasked.
    """

    step: int
    given: str
    pieces: list[str]
    order: list[int]

    def to_json(self) -> bytes:
        """Return a line of RUN/texts.jsonl."""
        return orjson.dumps(asdict(self)) + b"\n"


def read_texts(run_dir: Path) -> list[ShownText]:
    """Return the texts of a run; raise a `UserError` for a damaged line."""
    return [ShownText(**entry) for entry in read_lines(run_dir / TEXTS_FILE)]


def colours(order: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return a light RGB colour for each place in the order, from blue (first) over green to red (last)."""
    last = max(1, max(order, default=0))
    hues = [_FIRST_HUE + (_LAST_HUE - _FIRST_HUE) * each / last for each in order]
    rgb = (colorsys.hls_to_rgb(hue, 0.82, 0.75) for hue in hues)
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in rgb]


def as_html(text: ShownText) -> str:
    """Return the text for an HTML page; pointing at a token shows its step."""
    spans = (
        f'<b style="background:rgb{colour}" title="step {step}">{html.escape(piece)}</b>'
        for piece, step, colour in zip(text.pieces, text.order, colours(text.order), strict=True)
    )
    return f'<p class="text">{html.escape(text.given)}{"".join(spans)}</p>'


def as_picture(text: ShownText) -> np.ndarray:
    """Return the text as a picture [height, width, 3] uint8; letters that are not Latin become boxes."""
    font = ImageFont.load_default(_SIZE)
    parts = [(word, (255, 255, 255)) for word in _words(text.given)]
    parts += list(zip(text.pieces, colours(text.order), strict=True))
    places, x, y = [], float(_MARGIN), _MARGIN
    for piece, colour in parts:
        shown = piece.replace("\n", "\\n")
        width = font.getlength(shown)
        if x + width > _WIDTH - _MARGIN and x > _MARGIN:
            x, y = float(_MARGIN), y + _LINE
        places.append((x, y, width, shown, colour))
        x += width
    picture = Image.new("RGB", (_WIDTH, y + _LINE + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for x, y, width, shown, colour in places:
        draw.rectangle((x, y, x + width, y + _LINE - 4), fill=colour)
        draw.text((x, y + 1), shown, font=font, fill=(30, 30, 30))
    return np.asarray(picture)


def _words(text: str) -> list[str]:
    """Cut a text where a line may end; the parts together are the text."""
    words = text.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:]
