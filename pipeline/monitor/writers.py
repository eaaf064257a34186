"""Where the curves go: TensorBoard and metrics.jsonl always, Weights & Biases where it is asked for."""

from __future__ import annotations

import dataclasses
import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import orjson
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipeline import config as configuration
from pipeline.base.extras import extra
from pipeline.base.files import append, keep_lines
from pipeline.chains.statistics import Histogram
from pipeline.config import Config
from pipeline.config.load import flatten
from pipeline.monitor.dashboard import LAYOUT
from pipeline.monitor.texts import TEXTS_FILE, ShownText, as_html, as_picture, as_plain

METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb_id"


def is_measured(name: str) -> bool:
    """Say whether a figure is a time, a rate or a size of memory, which no two runs share."""
    return (
        name.startswith(("ranks/", "speed/", "time/", "memory/"))
        or name.endswith("_per_second")
        or name == "unix_time"
    )


@dataclass
class Point:
    """What is known of one step.

    Attributes:
        step: the optimizer step.
        scalars: figures by name.
        bins: families of figures: for each name a figure for each bin.
        histograms: by name.
    """

    step: int
    scalars: Mapping[str, float]
    bins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    def tagged(self) -> dict[str, float]:
        """Return all scalars and bins under the tags that TensorBoard groups by."""
        tags = {name if "/" in name else f"train/{name}": value for name, value in self.scalars.items()}
        return tags | {
            f"{name}/{key}": value for name, bins in self.bins.items() for key, value in bins.items()
        }


class Writer(Protocol):
    """Something that keeps points; what it cannot keep, for a full disk, it says by an OSError."""

    def write(self, point: Point) -> None:
        """Keep a point; steps may come again, with other figures."""

    def write_texts(self, texts: Sequence[ShownText]) -> None:
        """Keep what the model wrote at one step."""

    def sync(self) -> None:
        """See to it that all points so far are in the files."""

    def close(self) -> None:
        """Write what is buffered."""


class JsonLines:
    """metrics.jsonl: one line a point; histograms are left to TensorBoard. And texts.jsonl.

    Attributes:
        lost_steps: training steps that were in the file from the first step on.
        last_sign: when its last line was written, in seconds since 1970; 0 for a new file.
        last_names: what is in the file for the step before.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open the files; lines from `first_step` on, and half a line of a killed process, are dropped."""
        self.path, self.texts = run_dir / METRICS_FILE, run_dir / TEXTS_FILE
        self.lost_steps, self.last_sign = 0, 0.0
        names: set[str] = set()

        def wanted(line: bytes) -> bool:
            entry = orjson.loads(line)
            keep = bool(entry["step"] < first_step)
            self.last_sign = entry.get("unix_time", self.last_sign)
            self.lost_steps += "loss" in entry and not keep
            if entry["step"] == first_step - 1:
                names.update(entry)
            return keep

        keep_lines(self.path, wanted)
        self.last_names = frozenset(names)
        keep_lines(self.texts, lambda line: orjson.loads(line)["step"] < first_step)

    def write(self, point: Point) -> None:
        """See `Writer`; "unix_time" is when the line was written."""
        line = {"step": point.step, **point.scalars, **point.bins, "unix_time": round(time.time(), 2)}
        append(self.path, orjson.dumps(line) + b"\n")

    def write_texts(self, texts: Sequence[ShownText]) -> None:
        """See `Writer`."""
        append(self.texts, b"".join(text.to_json() for text in texts))

    def sync(self) -> None:
        """See `Writer`: nothing is held back."""

    def close(self) -> None:
        """See `Writer`."""


class TensorBoard:
    """Events in RUN/tensorboard, with the settings as text and a first page of their own."""

    def __init__(self, run_dir: Path, first_step: int, config: Config) -> None:
        """Open a file of events, before which TensorBoard forgets steps from `first_step` on."""
        self.folder = str(run_dir / "tensorboard")
        self.writer = SummaryWriter(self.folder, purge_step=first_step)
        self.writer.add_custom_scalars(LAYOUT)
        self.writer.add_text("config", _as_code(configuration.to_yaml(config)), first_step - 1)
        # add_hparams itself would write to a run of its own.
        settings = {key: _plain(value) for key, value in flatten(dataclasses.asdict(config)).items()}
        for summary in hparams(settings, {"train/loss": 0.0, "held_out/loss": 0.0}):
            self.writer.file_writer.add_summary(summary)

    def write(self, point: Point) -> None:
        """See `Writer`."""
        for tag, value in point.tagged().items():
            self.writer.add_scalar(tag, value, point.step)
        for name, histogram in point.histograms.items():
            self._write_histogram(name, histogram, point.step)

    def _write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        edges, counts = histogram
        total = sum(counts)
        if not total:
            return
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        self.writer.add_histogram_raw(
            f"histograms/{name}",
            min=edges[0],
            max=edges[-1],
            num=total,
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )

    def write_texts(self, texts: Sequence[ShownText]) -> None:
        """See `Writer`: the order of unmasking as a picture, and the bare text, in any script."""
        for number, text in enumerate(texts):
            tag = f"texts/{number}"
            self.writer.add_image(tag, as_picture(text), text.step, dataformats="HWC")
            self.writer.add_text(tag, _as_code(as_plain(text)), text.step)

    def sync(self) -> None:
        """See `Writer`; where a point could not be written, a new file begins: the old one takes no more."""
        try:
            self.writer.flush()
        except OSError:
            self.writer = SummaryWriter(self.folder)

    def close(self) -> None:
        """See `Writer`."""
        self.writer.close()


def _as_code(text: str) -> str:
    """Return Markdown that shows a text as it is: indented, it is code."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _plain(value: Any) -> str | bool | int | float:
    """Return a setting as a type that TensorBoard's hparams know."""
    return value if isinstance(value, str | bool | int | float) else str(value)


class WeightsAndBiases:
    """The same curves on wandb; a run that goes on there, too, is told by the id in RUN/wandb_id."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        """Begin or continue the run."""
        path = run_dir / WANDB_FILE
        if not path.exists():
            path.write_text(uuid.uuid4().hex, encoding="utf-8")
        self.run = require_wandb().init(
            project=config.monitor.wandb_project,
            name=run_dir.name,
            id=path.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=dataclasses.asdict(config),
        )
        # wandb's own counter never goes back, as ours does after a restart.
        self.run.define_metric("*", step_metric="step")

    def write(self, point: Point) -> None:
        """See `Writer`."""
        self.run.log({"step": point.step, **point.tagged()})

    def write_texts(self, texts: Sequence[ShownText]) -> None:
        """See `Writer`."""
        shown = {f"texts/{number}": require_wandb().Html(as_html(text)) for number, text in enumerate(texts)}
        self.run.log({"step": texts[0].step, **shown})

    def sync(self) -> None:
        """See `Writer`: wandb sends from a process of its own."""

    def close(self) -> None:
        """See `Writer`."""
        self.run.finish()


def require_wandb() -> ModuleType:
    """Return the module wandb; raise a `UserError` where it is not installed."""
    with extra("wandb", "monitor.wandb"):
        import wandb
    return wandb
