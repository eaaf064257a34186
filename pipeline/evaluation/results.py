"""What an evaluation found: a JSON file, and until it exists a line for each item that is done."""

from __future__ import annotations

import glob
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from pipeline.base.errors import UserError
from pipeline.base.files import keep_lines, replacing

Row = dict[str, Any]
PACKAGES = ("torch", "sentencepiece", "tokenizers", "numpy")


class Results:
    """The results in ``NAME.json``, with ``NAME.items.RANK.jsonl`` beside it while items are missing."""

    def __init__(self, path: Path, settings: dict[str, Any], restart: bool = False) -> None:
        """Name the file; nothing is read or written yet.

        Args:
            path: NAME.json.
            settings: all that decides the results, by the names of the command line's options.
            restart: remove what an earlier start has left.
        """
        self.path, self.settings, self.restart = path, settings, restart
        self.items = f"{path.name.removesuffix('.json')}.items"  # v1.2 is not v1.3
        self.file: BinaryIO | None = None

    def read(self) -> dict[int, Row]:
        """Return the rows of items that were done before, by number; the first rank alone calls this.

        Raises:
            UserError: when they were made with other settings, or the file is no such file.
        """
        if self.restart:
            self.remove_items()
            self.path.unlink(missing_ok=True)
        done: dict[int, Row] = {}
        for part in self.item_files():
            keep_lines(part, lambda line: bool(orjson.loads(line)))
            first, *rows = (orjson.loads(line) for line in part.read_bytes().splitlines() or [b"{}"])
            try:
                done |= self.checked(first, rows, part)
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"{part} is damaged: remove it, and its items are measured again.") from None
        try:
            if self.path.exists():
                tree = orjson.loads(self.path.read_bytes())
                done |= self.checked(tree, tree["items"], self.path)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f"{self.path} holds no results of an evaluation: give another --output, or --restart to "
                "replace it."
            ) from None
        return done

    def item_files(self) -> list[Path]:
        """Return the files of single items."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.items)}.*.jsonl"))

    def remove_items(self) -> None:
        """Remove the files of single items."""
        for part in self.item_files():
            part.unlink()

    def checked(self, tree: Row, rows: list[Row], source: Path) -> dict[int, Row]:
        """Return rows by number, if the settings in `tree` are those of now."""
        before = tree["settings"] if rows else self.settings
        for name in {**before, **self.settings}:
            then, now = before.get(name), self.settings.get(name)
            if then != now:
                raise UserError(
                    f"{source} was made with {name} = {then}, now it is {now}: set it back, give another "
                    "--output, or --restart to begin anew."
                )
        return {row["item"]: row for row in rows}

    def write(self, rank: int, rows: list[Row]) -> None:
        """Note items that a rank has done."""
        if self.file is None:
            path = self.path.with_name(f"{self.items}.{rank}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab")
            if self.file.tell() == 0:
                self.file.write(orjson.dumps({"settings": self.settings}) + b"\n")
        self.file.write(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        self.file.flush()

    def finish(self, figures: dict[str, Any], rows: list[Row]) -> None:
        """Write the JSON file; the files of single items are not needed any more."""
        tree = {
            "settings": self.settings,
            "versions": {name: version(name) for name in PACKAGES},
            "figures": figures,
            "items": rows,
        }
        with replacing(self.path) as file:
            file.write(json.dumps(tree, indent=2).encode() + b"\n")
        self.remove_items()
