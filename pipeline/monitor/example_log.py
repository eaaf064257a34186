"""Which examples each step was trained on: proof that none is lost or used twice."""

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
    """One file a rank, one line a step: ``{"step": 3, "samples": [[epoch, example], ...]}``, a pair a slot.

    An example stays in its slot for as many steps as its chain lasts. It is numbered as in the training split
    (tools/inspect_data.py). Reading the numbers waits for the device at every step.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, stream: SlotStream, first_step: int) -> None:
        """Open this rank's file; see `open`."""
        self.stream = stream
        self.ranks = ranks
        self.folder = run_dir / FOLDER
        self.file: BinaryIO | None = None
        self.open(first_step)

    def open(self, first_step: int) -> None:
        """Open this rank's file, once more after a rollback.

        In the files of all ranks, what was written from `first_step` on is dropped.
        """
        self.close()
        if self.ranks.is_first:
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.glob("*.jsonl"):
                keep_lines(path, lambda line: orjson.loads(line)["step"] < first_step)
        self.ranks.barrier()
        self.file = (self.folder / f"rank_{self.ranks.rank:05d}.jsonl").open("ab")

    def write(self, step: int, groups: Sequence[SlotGroup]) -> None:
        """Write the examples of `groups`, which `step` is about to be trained on."""
        positions = [position for group in groups for position in group.examples.ids.tolist()]
        examples = [[position // self.stream.size, self.stream.index(position)] for position in positions]
        assert self.file is not None
        self.file.write(orjson.dumps({"step": step, "samples": examples}) + b"\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
