"""Results of an evaluation: a JSON file and, until it is finished, one JSON line per finished item."""

from __future__ import annotations

import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from pipeline.base.errors import UserError
from pipeline.base.files import keep_lines, read_lines, require_file, write_json

Row = dict[str, Any]
PACKAGES = ("torch", "sentencepiece", "tokenizers", "numpy")


class Results:
    """Results in ``NAME.json``; ``NAME.items.RANK.jsonl`` hold finished items until all are finished."""

    def __init__(self, path: Path, settings: dict[str, Any], restart: bool = False) -> None:
        """Set the paths, without reading or writing; raise a `UserError` for a path that is no file.

        Args:
            path: NAME.json.
            settings: all settings that affect the results, by command-line option.
            restart: remove the results of an earlier attempt.
        """
        require_file(path)
        self.path, self.settings, self.restart = path, settings, restart
        self.items = f"{path.name.removesuffix('.json')}.items"  # not Path.stem: v1.2 differs from v1.3
        self.file: BinaryIO | None = None

    def read(self) -> dict[int, Row]:
        """Return the rows of finished items by number; only the first rank calls this.

        Raises:
            UserError: when they were made with other settings, or a file does not hold results.
        """
        if self.restart:
            self.remove_items()
            self.path.unlink(missing_ok=True)
        done: dict[int, Row] = {}
        for part in self.item_files():
            keep_lines(part, orjson.loads)  # drops a damaged line
            first, *rows = read_lines(part) or [{}]
            try:
                done |= self.checked(first, rows, part)
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"{part} is damaged: remove it to measure its items again.") from None
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
        """Return the files of finished items, one per rank."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.items)}.*.jsonl"))

    def remove_items(self) -> None:
        """Remove the files of finished items."""
        for part in self.item_files():
            part.unlink()

    def checked(self, tree: Row, rows: list[Row], source: Path) -> dict[int, Row]:
        """Return rows by number; raise a `UserError` if the settings in `tree` differ from today's."""
        before = tree["settings"] if rows else self.settings
        for name in {**before, **self.settings}:
            then, now = before.get(name), self.settings.get(name)
            if then != now:
                raise UserError(
                    f"{source} was made with {name} = {then}, now it is {now}: set it back, give another "
                    "--output, or --restart to start over."
                )
        return {row["item"]: row for row in rows}

    def write(self, rank: int, rows: list[Row]) -> None:
        """Append finished rows to the file of this rank."""
        if self.file is None:
            path = self.path.with_name(f"{self.items}.{rank}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab")
            if self.file.tell() == 0:
                self.file.write(orjson.dumps({"settings": self.settings}) + b"\n")
        self.file.write(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        self.file.flush()

    def finish(self, figures: dict[str, Any], rows: list[Row]) -> None:
        """Write the JSON file and remove the files of finished items."""
        tree = {
            "settings": self.settings,
            "versions": {name: version(name) for name in PACKAGES},
            "figures": figures,
            "items": rows,
        }
        write_json(self.path, tree)
        self.remove_items()
