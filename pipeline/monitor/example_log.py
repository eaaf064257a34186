"""Which samples each step was trained on: proof that none is lost or used twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import orjson

from pipeline.base.files import keep_lines
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.engine.runtime import Engine

FOLDER = "samples"


class SampleLog:
    """One file a rank, one line a step: ``{"step": 3, "samples": [[epoch, sample], ...]}``, a pair a slot.

    A sample stays in its slot for as many steps as its chain lasts. Its number is that of the training split
    (tools/inspect_data.py). Reading the numbers waits for the device at every step.
    """

    def __init__(self, run_dir: Path, engine: Engine, stream: SlotStream, first_step: int) -> None:
        """Open this rank's file; in all of them, what was written from `first_step` on is dropped."""
        self.stream = stream
        folder = run_dir / FOLDER
        if engine.launch.rank == 0:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("*.jsonl"):
                keep_lines(path, lambda line: orjson.loads(line)["step"] < first_step)
        engine.barrier()
        self.file: BinaryIO = (folder / f"rank_{engine.launch.rank:05d}.jsonl").open("ab")

    def write(self, step: int, groups: Sequence[SlotGroup]) -> None:
        """Write the samples of `groups`, which `step` is about to be trained on."""
        positions = [position for group in groups for position in group.samples.ids.tolist()]
        samples = [[position // self.stream.size, self.stream.index(position)] for position in positions]
        self.file.write(orjson.dumps({"step": step, "samples": samples}) + b"\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
