"""What the guard refused: RUN/skipped.jsonl, for people to read and for the run to leave out bad examples.

A line a skipped step: ``{"step": 120, "problem": "the loss is not finite", "samples": [3, 17]}``, and a line
a rollback: ``{"step": 124, "rollback_to": 100, "excluded": [3, 17]}``. Examples are numbered as in the
training split (tools/inspect_data.py). The file outlives the checkpoints: what was left out stays left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from pipeline.base.files import append, keep_lines, read_lines
from pipeline.ranks import Ranks

SKIPPED_FILE = "skipped.jsonl"


class SkipLog:
    """The file, and what it says; the first rank reads and writes it for all."""

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        """Read what earlier processes of the run left; every rank calls this."""
        self.path = run_dir / SKIPPED_FILE
        self.writes = ranks.is_first
        entries: list[dict[str, Any]] = []
        if self.writes and self.path.exists():
            keep_lines(self.path, lambda _: True)  # half a line of a killed process goes
            entries = read_lines(self.path)
        self.entries = ranks.all_gather(entries)[0]
        self.unwritten = b""

    def skipped(self) -> int:
        """Return how many steps were skipped since the run began."""
        return sum("problem" in entry for entry in self.entries)

    def excluded(self) -> set[int]:
        """Return the examples that are left out."""
        return {example for entry in self.entries for example in entry.get("excluded", [])}

    def rollbacks_to(self, step: int) -> int:
        """Return how often the run went back to the checkpoint of `step`."""
        return sum(entry.get("rollback_to") == step for entry in self.entries)

    def skip(self, step: int, problem: str, examples: Sequence[int]) -> None:
        """Note a skipped step with the examples that were in it."""
        self._write({"step": step, "problem": problem, "samples": sorted(set(examples))})

    def roll_back(self, step: int, to: int, in_a_row: int) -> None:
        """Note that the run goes back from `step` to `to`, without the examples of the last skipped steps.

        There are `in_a_row` of them, some perhaps from before a restart: they are read from the file.
        """
        skipped = [entry["samples"] for entry in self.entries if "problem" in entry][-in_a_row:]
        excluded = {example for examples in skipped for example in examples}
        self._write({"step": step, "rollback_to": to, "excluded": sorted(excluded)})

    def _write(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self.writes:
            self.unwritten += orjson.dumps(entry) + b"\n"
            self.sync()

    def sync(self) -> None:
        """Bring to the disk what a full one has not taken so far; the run goes on, as for its saves."""
        if not self.unwritten:
            return
        try:
            append(self.path, self.unwritten)
            self.unwritten = b""
            with self.path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            print(f"{self.path}: {error.strerror}. It is tried again at the next save.", flush=True)
