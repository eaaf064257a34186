"""Read prompts from lines and records, and parse masked spans; importing this needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.corpus.records import Keys, read_all

_SPAN = re.compile(r"(?<!\\)\[MASK\*(.*?)\]")


def read_prompts(path: Path, key: str) -> list[str]:
    """Return the lines of a text file, or the value of `key` in each record of a jsonl or parquet file.

    Raises:
        UserError: for an empty file, an unknown file type, or a record without the key.
    """
    text = ".txt" in path.suffixes[-2:]  # .txt, .txt.gz
    keys = Keys((key,), split="line" if text else None)
    prompts = [record.texts[0] for record in read_all([path], keys)]
    if not prompts:
        raise UserError(f"{path} holds no prompt: give one prompt per line.")
    return prompts


def spans(text: str) -> list[str | int]:
    r"""Split a text into given pieces (str) and masked spans (int, length in tokens).

    ``\[MASK*N]`` is the text ``[MASK*N]``.

    Raises:
        UserError: for a [MASK*N] without a positive number.
    """
    pieces: list[str | int] = []
    for number, piece in enumerate(_SPAN.split(text)):
        if number % 2 == 0:
            pieces += [piece.replace(r"\[MASK*", "[MASK*")] if piece else []
        elif piece.isdecimal() and int(piece) > 0:
            pieces.append(int(piece))
        else:
            raise UserError(f"[MASK*{piece}] in {text!r}: give the number of tokens, such as [MASK*12].")
    return pieces
