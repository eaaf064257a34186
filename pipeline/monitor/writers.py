"""Write metrics to metrics.jsonl and TensorBoard, and optionally to Weights & Biases."""

from __future__ import annotations

import dataclasses
import itertools
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import orjson
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipeline import config as configuration
from pipeline.base.extras import extra
from pipeline.base.files import append, keep_lines
from pipeline.chains.statistics import Histogram
from pipeline.config import Config
from pipeline.config.load import defaults, flatten, in_yaml
from pipeline.monitor.dashboard import Layout, layout_of, tag_of
from pipeline.monitor.history import METRICS_FILE
from pipeline.monitor.texts import TEXTS_FILE, ShownText, as_html, as_picture, as_plain

WANDB_FILE = "wandb_id"
# Settings that differ between runs without being what somebody compares.
_NOT_VARIED = (
    "run_dir", "data.prefixes", "data.tokenizer", "data.cache", "engine.deepspeed_config", "checkpoint.",
    "evaluation.", "monitor.", "watchdog.", "profiling.",
)  # fmt: skip


def is_measured(name: str) -> bool:
    """Return whether a metric is a time, rate or memory size, which differs between identical runs."""
    return (
        name.startswith(("ranks/", "speed/", "time/", "memory/"))
        or name.endswith("_per_second")
        or name == "unix_time"
    )


@dataclass
class Point:
    """The metrics of one step.

    Attributes:
        step: optimizer step.
        scalars: scalar metrics, by name.
        bins: binned metrics, by name: one value per bin.
        histograms: histograms, by name.
    """

    step: int
    scalars: Mapping[str, float]
    bins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    def tagged(self) -> dict[str, float]:
        """Return all scalars and bins, by TensorBoard tag."""
        tags = {tag_of(name): value for name, value in self.scalars.items()}
        return tags | {
            f"{name}/{key}": value for name, bins in self.bins.items() for key, value in bins.items()
        }


class Writer(Protocol):
    """A destination for points; raises an OSError if it cannot store one, for example on a full disk."""

    def write(self, point: Point) -> None:
        """Store a point; the same step may come again with other metrics."""

    def write_texts(self, texts: Sequence[ShownText]) -> None:
        """Store the texts generated at one step."""

    def sync(self) -> None:
        """Flush all points so far to disk."""

    def close(self) -> None:
        """Flush and close."""


class JsonLines:
    """Writes metrics.jsonl, one line per point without histograms, and texts.jsonl.

    Attributes:
        lost_steps: training steps dropped from the file, those from `first_step` on.
        last_sign: when the last line was written, in seconds since 1970; 0 for a new file.
        last_names: names of the metrics in the file for the step before `first_step`.
        tags: TensorBoard tags of all metrics in the file.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open the files; drop lines from `first_step` on and the partial line of a killed process."""
        self.path, self.texts = run_dir / METRICS_FILE, run_dir / TEXTS_FILE
        self.lost_steps, self.last_sign = 0, 0.0
        self.tags: set[str] = set()
        names: set[str] = set()

        def wanted(line: bytes) -> bool:
            entry = orjson.loads(line)
            keep = bool(entry["step"] < first_step)
            self.last_sign = entry.get("unix_time", self.last_sign)
            self.lost_steps += "loss" in entry and not keep
            if entry["step"] == first_step - 1:
                names.update(entry)
            if keep:
                self.tags.update(_tags_in(entry))
            return keep

        keep_lines(self.path, wanted)
        self.last_names = frozenset(names)
        keep_lines(self.texts, lambda line: orjson.loads(line)["step"] < first_step)

    def write(self, point: Point) -> None:
        """See `Writer`; "unix_time" is the time of writing."""
        line = {"step": point.step, **point.scalars, **point.bins, "unix_time": round(time.time(), 2)}
        append(self.path, orjson.dumps(line) + b"\n")

    def write_texts(self, texts: Sequence[ShownText]) -> None:
        append(self.texts, b"".join(text.to_json() for text in texts))

    def sync(self) -> None:
        """See `Writer`; nothing is buffered."""

    def close(self) -> None:
        """See `Writer`."""


def _tags_in(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield the TensorBoard tags of the metrics in a line of metrics.jsonl."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from (f"{name}/{key}" for key in value)
        else:
            yield tag_of(name)


class TensorBoard:
    """Writes events to RUN/tensorboard, with the settings as text and a custom-scalars page."""

    def __init__(self, run_dir: Path, first_step: int, config: Config, tags: Iterable[str]) -> None:
        """Open an event file that makes TensorBoard drop earlier entries from `first_step` on.

        Args:
            run_dir: run folder.
            first_step: the next step.
            config: configuration of the run.
            tags: tags of what earlier processes wrote before `first_step`.
        """
        self.folder = str(run_dir / "tensorboard")
        self.writer = SummaryWriter(self.folder, purge_step=first_step)
        self.tags, self.layout = set(tags), Layout()
        self._lay_out()
        self.writer.add_text("config", _as_code(configuration.to_yaml(config)), first_step - 1)
        for summary in _settings_page(config):
            self.writer.file_writer.add_summary(summary)

    def _lay_out(self) -> None:
        """Write the custom-scalars page if it has other charts now; TensorBoard shows the last one."""
        layout = layout_of(self.tags)
        if layout != self.layout:
            self.writer.add_custom_scalars(layout)
            self.layout = layout

    def write(self, point: Point) -> None:
        values = point.tagged()
        if not values.keys() <= self.tags:
            self.tags |= values.keys()
            self._lay_out()
        for tag, value in values.items():
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
        """See `Writer`; writes an image of the order of unmasking, and the plain text in any script."""
        for number, text in enumerate(texts):
            tag = f"texts/{number}"
            self.writer.add_image(tag, as_picture(text), text.step, dataformats="HWC")
            self.writer.add_text(tag, _as_code(as_plain(text)), text.step)

    def sync(self) -> None:
        """See `Writer`; after a failed write, start a new file, as the old writer accepts no more points."""
        try:
            self.writer.flush()
        except OSError:
            self.writer = SummaryWriter(self.folder)

    def close(self) -> None:
        self.writer.close()


def _as_code(text: str) -> str:
    """Return Markdown that shows a text verbatim, as an indented code block."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _settings_page(config: Config) -> list[Summary]:
    """Return the summaries of the HParams page; what differs from the defaults of the training comes first.

    TensorBoard orders settings by the flag `differs`, then by name, and shows the first five until asked. It
    takes the flags of one of the runs that it shows. SummaryWriter.add_hparams would start a run of its own.
    """
    settings = flatten(dataclasses.asdict(config))
    usual = defaults()
    # Numbers stay numbers; TensorBoard would show true as 1.0000.
    plain = {
        key: value if isinstance(value, int | float) and not isinstance(value, bool) else in_yaml(value)
        for key, value in settings.items()
    }
    summaries = hparams(plain, {"train/loss": 0.0, "held_out/loss": 0.0})
    metadata = summaries[0].value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(metadata.content)
    for info in content.experiment.hparam_infos:
        differs = settings[info.name] != usual.get(info.name)
        info.differs = differs and not info.name.startswith(_NOT_VARIED)
    metadata.content = content.SerializeToString()
    return list(summaries)


class WeightsAndBiases:
    """Logs to Weights & Biases. A resumed run continues the same W&B run; its id is in RUN/wandb_id."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        """Start or resume the W&B run."""
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
        # wandb's own step counter never decreases, but ours does after a restart.
        self.run.define_metric("*", step_metric="step")

    def write(self, point: Point) -> None:
        self.run.log({"step": point.step, **point.tagged()})

    def write_texts(self, texts: Sequence[ShownText]) -> None:
        shown = {f"texts/{number}": require_wandb().Html(as_html(text)) for number, text in enumerate(texts)}
        self.run.log({"step": texts[0].step, **shown})

    def sync(self) -> None:
        """See `Writer`; wandb uploads from its own process."""

    def close(self) -> None:
        self.run.finish()


def require_wandb() -> ModuleType:
    """Return the wandb module; raise a `UserError` if it is not installed."""
    with extra("wandb", "monitor.wandb"):
        import wandb
    return wandb
