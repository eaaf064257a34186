"""Log the examples of each training step, to prove that none is lost or repeated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import orjson

from pipeline.base.files import keep_lines
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.ranks import Ranks

FOLDER = "samples"


class ExampleLog:
    """Writes one file per rank, one line per step: ``{"step": 3, "samples": [[epoch, example], ...]}``.

    A line has one pair per slot. An example stays in its slot until its chain ends. Its number is the index
    in the training split (tools/inspect_data.py); those of a later phase of the data follow those of the
    phase before it, and its epochs count from 0. Reading the numbers synchronises with the device at every
    step.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, stream: SlotStream, first_step: int) -> None:
        """Open the file of this rank; see `open`."""
        self.stream = stream
        self.ranks = ranks
        self.folder = run_dir / FOLDER
        self.file: BinaryIO | None = None
        self.open(first_step)

    def open(self, first_step: int) -> None:
        """Open the file of this rank, or reopen it after a rollback.

        Entries from `first_step` on are dropped from the files of all ranks.
        """
        self.close()
        if self.ranks.is_first:
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.glob("*.jsonl"):
                keep_lines(path, lambda line: orjson.loads(line)["step"] < first_step)
        self.ranks.barrier()
        self.file = (self.folder / f"rank_{self.ranks.rank:05d}.jsonl").open("ab")

    def write(self, step: int, groups: Sequence[SlotGroup]) -> None:
        """Write the examples in `groups`, on which `step` is about to train."""
        ids = [id for group in groups for id in group.examples.ids.tolist()]
        examples = [(self.stream.epoch(id), self.stream.index(id)) for id in ids]
        assert self.file is not None
        self.file.write(orjson.dumps({"step": step, "samples": examples}) + b"\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
