"""Build a self-contained HTML report of one or more runs from their files."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.base.errors import UserError
from pipeline.base.files import read_lines
from pipeline.config.load import flatten, read_yaml
from pipeline.monitor.charts import Curve, line_chart
from pipeline.monitor.history import Start, read_history
from pipeline.monitor.texts import ShownText, as_html, read_texts
from pipeline.monitor.writers import METRICS_FILE
from pipeline.resilience.skipped import SKIPPED_FILE

LOSSES = ("loss", "held_out/loss", "held_out/ema_loss", "held_out/bound", "held_out/ema_bound")
CHARTS = (
    ("gradient norm", "gradient_norm"),
    ("learning rate", "learning_rate"),
    ("share of masked positions", "masked_fraction"),
    ("steps of a chain", "chains/mean_length"),
    ("positions revealed a step", "chains/reveals_per_step"),
    ("accuracy of the masked positions", "calibration/accuracy"),
    ("expected calibration error", "calibration/error"),
    ("tokens a second", "tokens_per_second"),
    ("TFLOP/s a rank", "speed/tflops"),
    ("epochs", "progress/epochs"),
)
FAMILIES = (
    ("loss by mask ratio", "loss_by_mask_ratio"),
    ("loss by stage", "loss_by_stage"),
    ("accuracy by confidence", "accuracy_by_confidence"),
)
_TEXTS = 3  # of the last evaluation


@dataclass
class Record:
    """The records of a run.

    Attributes:
        name: name on the page.
        settings: configuration, by dotted key.
        lines: entries of metrics.jsonl.
        skipped: entries of skipped.jsonl.
        history: starts of the run.
        texts: texts written by the model during training, in order of steps.
    """

    name: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    history: list[Start]
    texts: list[ShownText]

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) pairs of a metric."""
        return [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]

    def total(self, key: str) -> float:
        """Return the sum of a metric over the run."""
        return sum(value for _, value in self.curve(key))

    def running_total(self, values: Mapping[float, float]) -> Callable[[float], float]:
        """Return a function of the step: the cumulative sum of `values`, interpolated between their steps."""
        steps = sorted(values)
        places = np.array([0.0, *steps])  # converted once: per point it would take hours for a long run
        sums = np.cumsum([0.0, *(values[step] for step in steps)])
        return lambda step: float(np.interp(step, places, sums))

    def axes(self) -> dict[str, Callable[[float], float]]:
        """Return the possible x-axes, as functions of the step."""
        a_step = self.settings["train.global_batch_size"] * self.settings["data.sequence_length"]
        flops, before = {}, 0.0
        for step, each in self.curve("progress/flops_per_step"):
            flops[step] = each * (step - before)
            before = step
        hours: dict[float, float] = {}
        for key in TIMES:
            for step, seconds in self.curve(key):
                hours[step] = hours.get(step, 0.0) + seconds / 3600
        return {
            "steps": lambda step: step,
            "tokens": lambda step: step * a_step,
            "FLOPs": self.running_total(flops),
            "hours": self.running_total(hours),
        }


TIMES = ("time/training", "time/evaluation", "time/checkpoint_stall")


def read_record(run_dir: Path, name: str) -> Record:
    """Read the records of the run in `run_dir`.

    Raises:
        UserError: if it is not a run folder, or the run has not logged a step yet.
    """
    for needed in (METRICS_FILE, "config.yaml"):
        if not (run_dir / needed).is_file():
            raise UserError(
                f"{run_dir} has no {needed}: give the folder (run_dir) of a run that has trained a step."
            )
    lines = read_lines(run_dir / METRICS_FILE)
    if not any("loss" in line for line in lines):
        raise UserError(f"{run_dir / METRICS_FILE} has no step yet: wait for train.log_interval steps.")
    return Record(
        name,
        flatten(read_yaml(run_dir / "config.yaml")),
        lines,
        read_lines(run_dir / SKIPPED_FILE),
        read_history(run_dir),
        read_texts(run_dir),
    )


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """Return a unique name for each run: its folder, with as many parent folders as needed."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{run_dirs[0]} is given twice: name each run once.")


def report(run_dirs: Sequence[Path]) -> str:
    """Return the HTML page; raise a `UserError` for a folder that is not a run."""
    names = names_of(run_dirs)
    records = [read_record(run_dir, name) for run_dir, name in zip(run_dirs, names, strict=True)]
    sections = [
        ("Summary", _table(_summary(records))),
        ("Loss", _losses(records)),
        ("Curves", _charts(records)),
        *((f"Inside {record.name}", _families(record)) for record in records),
        ("Settings that differ", _differences(records)) if len(records) > 1 else None,
        ("Time", _table(_time_use(records))),
        *((f"Starts and skipped steps of {record.name}", _faults(record)) for record in records),
        *((f"Texts of {record.name}", _texts(record)) for record in records),
        *((f"All settings of {record.name}", _settings(record)) for record in records),
    ]
    shown = [section for section in sections if section is not None and section[1]]
    body = "".join(f"<section><h2>{html.escape(title)}</h2>{content}</section>" for title, content in shown)
    title = html.escape(", ".join(names))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )


def _table(rows: Iterable[Sequence[object]], heading: bool = True) -> str:
    """Return an HTML table; the first row is the heading unless `heading` is False."""
    lines = []
    for number, row in enumerate(rows):
        tag = "th" if heading and number == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _summary(records: Sequence[Record]) -> list[list[str]]:
    def last(record: Record, key: str, form: str) -> str:
        curve = record.curve(key)
        return form.format(curve[-1][1]) if curve else "-"

    def least(record: Record, key: str) -> str:
        curve = record.curve(key)
        step, value = min(curve, key=lambda point: point[1]) if curve else (0, 0)
        return f"{value:.4f} (step {step:,})" if curve else "-"

    def middle(record: Record, key: str, form: str) -> str:
        values = [value for _, value in record.curve(key)]
        return form.format(median(values)) if values else "-"

    rows = [["", *(record.name for record in records)]]
    facts: list[tuple[str, Callable[[Record], str]]] = [
        ("steps", lambda r: f"{r.curve('loss')[-1][0]:,} of {r.settings['train.steps']:,}"),
        ("tokens", lambda r: last(r, "progress/tokens", "{:,}")),
        ("epochs", lambda r: last(r, "progress/epochs", "{:.2f}")),
        ("FLOPs", lambda r: f"{r.axes()['FLOPs'](r.curve('loss')[-1][0]):.3g}"),
        ("last loss", lambda r: last(r, "loss", "{:.4f}")),
        ("lowest held-out loss", lambda r: least(r, "held_out/loss")),
        ("lowest held-out loss, EMA weights", lambda r: least(r, "held_out/ema_loss")),
        ("tokens a second, median", lambda r: middle(r, "tokens_per_second", "{:,.0f}")),
        ("TFLOP/s a rank, median", lambda r: middle(r, "speed/tflops", "{:.4g}")),
        ("MFU, median", lambda r: middle(r, "speed/mfu", "{:.3f}")),
        ("skipped steps", lambda r: str(sum("problem" in entry for entry in r.skipped))),
        ("starts", lambda r: str(len(r.history) or "-")),
    ]
    for name, fact in facts:
        cells = [fact(record) for record in records]
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    return rows


def _losses(records: Sequence[Record]) -> str:
    """Return charts of the losses over steps; for several runs also over tokens, FLOPs and hours."""
    charts = []
    axes = {record.name: record.axes() for record in records}
    for key in LOSSES:
        for axis in ("steps", "tokens", "FLOPs", "hours") if len(records) > 1 else ("steps",):
            curves: dict[str, Curve] = {}
            for record in records:
                place = axes[record.name][axis]
                curves[record.name] = [(place(step), value) for step, value in record.curve(key)]
            charts.append(line_chart(f"{key}, nats", axis, curves))
    return _grid(charts)


def _charts(records: Sequence[Record]) -> str:
    return _grid(
        line_chart(title, "steps", {record.name: record.curve(key) for record in records})
        for title, key in CHARTS
    )


def _families(record: Record) -> str:
    """Return the charts with one line per bin."""
    charts = []
    for title, family in FAMILIES:
        curves: dict[str, list[tuple[float, float]]] = {}
        for line in record.lines:
            for name, value in line.get(family, {}).items():
                curves.setdefault(name, []).append((line["step"], value))
        charts.append(line_chart(title, "steps", dict(sorted(curves.items())), ordered=True))
    return _grid(charts)


def _grid(charts: Iterable[str]) -> str:
    shown = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f'<div class="grid">{shown}</div>' if shown else ""


def _differences(records: Sequence[Record]) -> str:
    keys = sorted({key for record in records for key in record.settings} - {"run_dir"})
    rows = [["setting", *(record.name for record in records)]]
    for key in keys:
        values = [str(record.settings.get(key, "-")) for record in records]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return _table(rows) if len(rows) > 1 else "<p>Only the run folder.</p>"


def _settings(record: Record) -> str:
    rows = [("setting", "value"), *record.settings.items()]
    return f"<details><summary>{len(rows) - 1} settings</summary>{_table(rows)}</details>"


def _time_use(records: Sequence[Record]) -> list[list[str]]:
    """Return the time use: the measured parts, and the rest of the processes' lifetime."""
    rows = [["", *(record.name for record in records)]]
    columns = []
    for record in records:
        training, evaluation, stall = (record.total(key) for key in TIMES)
        share = dict(record.curve("speed/data_wait_share"))
        wait = sum(share.get(step, 0.0) * seconds for step, seconds in record.curve("time/training"))
        alive = sum(_length(record, start) for start in record.history)
        rest = max(0.0, alive - training - evaluation - stall)
        columns.append([training, wait, evaluation, stall, rest, alive])
    names = (
        "training",
        "of which waiting for data (slowest rank)",
        "evaluation",
        "checkpoint stall",
        "start-up, lost steps, shutdown",
        "total",
    )
    for name, values in zip(names, zip(*columns, strict=True), strict=True):
        cells = []
        for seconds, column in zip(values, columns, strict=True):
            of_all = f" ({seconds / column[-1]:.1%})" if column[-1] else ""
            cells.append(tqdm.format_interval(seconds) + of_all)
        rows.append([name, *cells])
    return rows


def _length(record: Record, start: Start) -> float:
    """Return the seconds that a process ran, up to its last known activity."""
    if start.ended is not None:
        return start.ended - start.started
    times = (line.get("unix_time", 0) for line in record.lines)
    written = [moment for moment in times if moment >= start.started]  # only the latest start gets here
    return max(written, default=start.started) - start.started


def _faults(record: Record) -> str:
    rows: list[list[object]] = [["started", "from step", "ranks", "steps lost before", "lasted", "end"]]
    for start in record.history:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start.started)) + " UTC"
        lasted = tqdm.format_interval(_length(record, start))
        rows.append([when, start.step, start.ranks, start.lost_steps, lasted, start.outcome])
    content = _table(rows) if len(rows) > 1 else ""
    if record.skipped:
        entries = [["step", "what"]]
        for entry in record.skipped:
            what = entry.get("problem") or (
                f"rolled back to step {entry['rollback_to']}, excluding {len(entry['excluded'])} examples"
            )
            entries.append([entry["step"], what])
        content += _table(entries)
    return content


def _texts(record: Record) -> str:
    last = max((text.step for text in record.texts), default=0)
    shown = [text for text in record.texts if text.step == last][:_TEXTS]
    return "".join(as_html(text) for text in shown)


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222 }
body { margin: 2em auto; max-width: 1440px; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; border-bottom: 1px solid #ddd; margin-top: 2em }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1em }
figure { margin: 0 } svg { width: 100%; height: auto } svg text { font-size: 11px; fill: #444 }
svg .title { font-size: 13px; font-weight: 600; fill: #222 } svg .middle { text-anchor: middle }
svg .end { text-anchor: end } svg line.grid { stroke: #e4e4e4 } svg polyline { stroke-width: 1.6 }
.legend { margin: 0; font-size: 12px } .legend span { margin-right: 1em; white-space: nowrap }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 4px; border-radius: 2px }
.wide { overflow-x: auto; margin-bottom: 1em }
table { border-collapse: collapse } td, th { padding: 3px 12px 3px 0; text-align: left; vertical-align: top }
tr + tr td { border-top: 1px solid #eee } td { font-variant-numeric: tabular-nums }
.text { line-height: 1.9; white-space: pre-wrap }
.text b { font-weight: inherit; padding: 1px 0; border-radius: 2px }
"""
