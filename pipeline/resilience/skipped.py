"""Log of skipped steps and rollbacks, RUN/skipped.jsonl; the run reads it to exclude bad examples.

One line per skipped step: ``{"step": 120, "problem": "the loss is not finite", "samples": [3, 17]}``. One
line per rollback: ``{"step": 124, "rollback_to": 100, "excluded": [3, 17]}``. Examples are indices into the
training split (tools/inspect_data.py); those of a later phase of the data follow those before it. The file is
not part of checkpoints, so a rollback keeps exclusions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from pipeline.base.files import append, keep_lines, read_lines

if TYPE_CHECKING:
    from pipeline.ranks import Ranks  # torch takes seconds, and a report needs only the file's name

SKIPPED_FILE = "skipped.jsonl"


class SkipLog:
    """RUN/skipped.jsonl and its entries; the first rank reads and writes the file for all ranks."""

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        """Read the entries of earlier attempts of the run; every rank calls this."""
        self.path = run_dir / SKIPPED_FILE
        self.writes = ranks.is_first
        entries: list[dict[str, Any]] = []
        if self.writes and self.path.exists():
            keep_lines(self.path, lambda _: True)  # drops the partial line of a killed process
            entries = read_lines(self.path)
        self.entries = ranks.all_gather(entries)[0]
        self.unwritten = b""

    def skipped(self) -> int:
        """Return the number of skipped steps since the start of the run."""
        return sum("problem" in entry for entry in self.entries)

    def excluded(self) -> set[int]:
        """Return the excluded examples."""
        return {example for entry in self.entries for example in entry.get("excluded", [])}

    def rollbacks_to(self, step: int) -> int:
        """Return the number of rollbacks to the checkpoint of `step`."""
        return sum(entry.get("rollback_to") == step for entry in self.entries)

    def skip(self, step: int, problem: str, examples: Sequence[int]) -> None:
        """Log a skipped step and its examples."""
        self._write({"step": step, "problem": problem, "samples": sorted(set(examples))})

    def roll_back(self, step: int, to: int, in_a_row: int) -> None:
        """Log a rollback from `step` to `to` that excludes the examples of the last `in_a_row` skipped steps.

        Some of these steps may precede a restart, so they are taken from the log.
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
        """Write the pending entries to disk; if that fails (full disk), keep them for the next call."""
        if not self.unwritten:
            return
        try:
            append(self.path, self.unwritten)
            self.unwritten = b""
            with self.path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            print(f"{self.path}: {error.strerror}. Retrying at the next save.", flush=True)
