"""Animate the order of unmasking as an HTML page or a GIF."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.base.errors import UserError
from pipeline.base.files import replacing
from pipeline.decoding.cells import Cell, Frame

WIDTH, MARGIN, FONT_SIZE = 800, 12, 18  # of a GIF, pixels
STILL_WIDTH = 350  # of a picture: that of TensorBoard's cards, which would shrink a wider one
MOST_FRAMES, SECONDS, LAST_SECONDS = 150, 8.0, 2.5  # of a GIF
MASK_WIDTH = 14  # pixels

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Order of unmasking</title><style>
body { font: 16px/1.7 ui-monospace, monospace; max-width: 60em; margin: 2em auto; padding: 0 1em;
  background: #fff; color: #222; }
.bar { position: sticky; top: 0; background: #fff; padding: .5em 0; display: flex; gap: 1em; }
input { flex: 1; } button { min-width: 5em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border-top: 1px solid #ccc; padding: 1em 0; }
.given { color: #777; } .mask { background: #ddd; border-radius: 3px; margin: 0 1px; }
.new { outline: 2px solid #222; } .token { border-radius: 3px; }
</style></head><body><h1>Order of unmasking</h1>
<p>Tokens are coloured from blue (first) to red (last); those of the current step are outlined.</p>
<div class="bar"><button id="play">pause</button><input id="at" type="range" min="0" value="0">
<span id="step"></span></div><div id="texts"></div><script>
const sequences = DATA;
const last = Math.max(...sequences.map(s => s.frames.length));
const at = document.getElementById("at"), play = document.getElementById("play");
at.max = last;
const boxes = sequences.map(() => {
  const box = document.createElement("div");
  box.className = "text";
  document.getElementById("texts").append(box);
  return box;
});
function show(frame) {
  document.getElementById("step").textContent = `step ${frame} of ${last}`;
  sequences.forEach((sequence, number) => {
    const cells = sequence.start.map(text => [text, null]);
    let length = cells.length;
    sequence.frames.slice(0, frame).forEach(one => {
      one.changes.forEach(([i, text, step]) => { cells[i] = [text, step]; });
      length = one.length;
    });
    boxes[number].replaceChildren(...cells.slice(0, length).map(([text, step]) => {
      const span = document.createElement("span");
      span.textContent = text === null ? "\\u00a0\\u00a0" : text;
      span.className = text === null ? "mask" : step === null ? "given" : "token";
      if (step !== null) {
        const hue = 230 * (1 - step / Math.max(1, sequence.frames.length - 1));
        span.style.background = `hsl(${hue}, 85%, 85%)`;
        span.title = `step ${step + 1}`;
        if (step === frame - 1) span.classList.add("new");
      }
      return span;
    }));
  });
}
let playing = true;
play.onclick = () => { playing = !playing; play.textContent = playing ? "pause" : "play"; };
at.oninput = () => { playing = false; play.textContent = "play"; show(Number(at.value)); };
show(0);
setInterval(() => {
  if (!playing) return;
  at.value = Number(at.value) >= last ? 0 : Number(at.value) + 1;
  show(Number(at.value));
}, Math.max(60, Math.min(600, 8000 / last)));
</script></body></html>
"""


def check_animation(path: Path, font: Path | None) -> None:
    """Raise a `UserError` for an unknown file type or an unreadable font."""
    if path.suffix not in (".html", ".gif"):
        raise UserError(f"--animate {path}: name a file that ends with .html or .gif.")
    if font is not None:
        _font(font)


def write_animation(path: Path, sequences: Sequence[Sequence[Frame]], font: Path | None = None) -> None:
    """Write the frames of several sequences as HTML or GIF.

    Args:
        path: .html or .gif; an existing file is replaced.
        sequences: the frames of each sequence, from the first step to the last; shown one below the other.
        font: a TrueType file for a GIF; the default font has ASCII only.
    """
    with replacing(path) as file:
        if path.suffix == ".html":
            file.write(page(sequences).encode())
            return
        pictures = gif_pictures(sequences, _font(font))
        each = int(1000 * min(0.6, max(0.04, SECONDS / len(pictures))))
        durations = [each] * (len(pictures) - 1) + [int(1000 * LAST_SECONDS)]
        pictures[0].save(
            file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
        )


def page(sequences: Sequence[Sequence[Frame]]) -> str:
    """Return a self-contained HTML page; each frame is stored as its changes."""
    data = [
        {
            "start": [_shown(cell) for cell in before_the_first(frames)],
            "frames": [
                {"length": len(after.cells), "changes": _changes(before, after.cells)}
                for before, after in zip(
                    [before_the_first(frames), *(frame.cells for frame in frames)], frames, strict=False
                )
            ],
        }
        for frames in sequences
    ]
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can close the script tag
    return _PAGE.replace("DATA", text)


def before_the_first(frames: Sequence[Frame]) -> list[Cell]:
    """Return the cells before the first step: given tokens and masks."""
    longest = max(frames, key=lambda frame: len(frame.cells)).cells
    return [Cell("", None, True) if cell.masked or cell.filled is not None else cell for cell in longest]


def _shown(cell: Cell) -> str | None:
    return None if cell.masked else cell.text


def _changes(before: Sequence[Cell], after: Sequence[Cell]) -> list[tuple[int, str | None, int | None]]:
    return [
        (i, _shown(new), new.filled)
        for i, (old, new) in enumerate(zip(before, after, strict=False))
        if old != new
    ]


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(path: Path | None) -> Font:
    if path is None:
        return ImageFont.load_default(FONT_SIZE)
    try:
        return ImageFont.truetype(str(path), FONT_SIZE)
    except OSError as error:
        raise UserError(f"--font {path} cannot be read as a font: {error}. Name a .ttf file.") from None


def gif_pictures(sequences: Sequence[Sequence[Frame]], font: Font) -> list[Image.Image]:
    """Return pictures of equal size: the start, at most `MOST_FRAMES` evenly spaced steps, and the end."""
    last = max(len(frames) for frames in sequences)
    stride = -(-last // MOST_FRAMES)
    steps = [0, *range(1, last, stride), last]
    found = [
        [
            (before_the_first(frames) if step == 0 else frames[min(step, len(frames)) - 1].cells, len(frames))
            for frames in sequences
        ]
        for step in steps
    ]
    height = max(_draw(None, one, font, WIDTH) for one in found)
    pictures = []
    for one in found:
        picture = Image.new("RGB", (WIDTH, height), "white")
        _draw(ImageDraw.Draw(picture), one, font, WIDTH)
        pictures.append(picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    return pictures


def still_picture(cells: Sequence[Cell], steps: int) -> Image.Image:
    """Return one picture of a sequence that was filled in `steps` steps; the font has ASCII only."""
    font, sequences = _font(None), [(cells, steps)]
    height = _draw(None, sequences, font, STILL_WIDTH)
    picture = Image.new("RGB", (STILL_WIDTH, height), "white")
    _draw(ImageDraw.Draw(picture), sequences, font, STILL_WIDTH)
    return picture


def _draw(
    draw: ImageDraw.ImageDraw | None,
    sequences: Sequence[tuple[Sequence[Cell], int]],
    font: Font,
    picture_width: int,
) -> int:
    """Draw (cells, steps) of each sequence, or only measure without `draw`; return the height in pixels."""
    line, y = int(FONT_SIZE * 1.5), MARGIN
    for cells, steps in sequences:
        x = float(MARGIN)
        for cell in cells:
            for number, part in enumerate(cell.text.split("\n")):
                width = MASK_WIDTH if cell.masked else font.getlength(part)
                if number or x + width > picture_width - MARGIN:
                    x, y = float(MARGIN), y + line
                box = (x + 1, y + 2, x + width - 1, y + line - 3)
                if draw is not None and cell.masked:
                    draw.rectangle(box, fill="#dddddd")
                elif draw is not None and width > 0:
                    if cell.filled is not None:
                        draw.rectangle(box, fill=colour_of(cell.filled, steps))
                    draw.text((x, y + 2), part, fill="#555555" if cell.filled is None else "black", font=font)
                x += width
        y += 2 * line
    return y - line + MARGIN


def colour_of(step: int, steps: int) -> str:
    """Return the background of a token as #rrggbb, from blue at the first step to red at the last."""
    hue = 230 / 360 * (1 - step / max(1, steps - 1))
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.85, 0.85))
    return f"#{red:02x}{green:02x}{blue:02x}"
