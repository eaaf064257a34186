"""Build a self-contained HTML report of one or more runs from their files."""

from __future__ import annotations

import html
import itertools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import orjson

from pipeline.base.errors import UserError
from pipeline.config.load import defaults, in_yaml
from pipeline.monitor.charts import chart_data
from pipeline.monitor.history import Start
from pipeline.monitor.run_record import TIMES, Record, read_record
from pipeline.monitor.scores import Score
from pipeline.monitor.texts import as_html

_TEXTS = 3  # of the last evaluation
_HOSTS = 4  # named; the others are counted
_NUMBER = re.compile(r"-?[\d,.]+(e-?\d+)?|-")
_TOOLS = """<div class=tools>
<label>horizontal axis <select id=axis><option>steps</option><option>tokens</option>
<option>FLOPs</option><option>hours</option></select></label>
<label><input id=logx type=checkbox> log</label>
<label>smoothing <input id=weight type=range min=0 max=0.99 step=0.01 value=0><output>0</output></label>
<span>Drag over a chart to zoom, double-click to reset.</span></div>
<noscript><p>The charts need JavaScript.</p></noscript>"""


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
    headings, data = chart_data(records)
    sections = [
        ("Summary", _table(_summary(records))),
        ("Scores", _scores(records)),
        *((heading, _figures(numbers)) for heading, numbers in headings.items()),
        ("Settings that differ", _differences(records)) if len(records) > 1 else None,
        *((f"Phases of {record.name}", _phases(record)) for record in records),
        ("Time", _table(_time_use(records))),
        *((f"Starts of {record.name}", _starts(record)) for record in records),
        *((f"Skipped steps of {record.name}", _skipped(record)) for record in records),
        *((f"Texts of {record.name}", _texts(record)) for record in records),
        *((f"Settings of {record.name}", _settings(record)) for record in records),
    ]
    shown = [section for section in sections if section is not None and section[1]]
    parts = [f"<section><h2>{html.escape(title)}</h2>{content}</section>" for title, content in shown]
    parts.insert(2 if any(record.scores for record in records) else 1, _TOOLS)
    title = html.escape(", ".join(names))
    style, script = (Path(__file__).with_suffix(suffix).read_text("utf-8") for suffix in (".css", ".js"))
    json = orjson.dumps(data).decode().replace("<", "\\u003c")  # a name must not end the element
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head>'
        f'<body><h1>{title}</h1>{"".join(parts)}<script type="application/json" id="data">{json}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _figures(numbers: Sequence[int]) -> str:
    """Return the places of charts, which report.js draws."""
    return (
        f'<div class="grid">{"".join(f"<figure data-chart={number}></figure>" for number in numbers)}</div>'
    )


def _table(rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table; the first row is the heading, and columns of numbers are aligned at the right."""
    heading, *cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    marks = [" class=n" if all(map(_NUMBER.fullmatch, column)) else "" for column in columns]
    lines = []
    for tag, row in [("th", heading), *(("td", row) for row in cells)]:
        shown = (f"<{tag}{mark}>{html.escape(c)}</{tag}>" for mark, c in zip(marks, row, strict=True))
        lines.append(f"<tr>{''.join(shown)}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 4.2 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second:02d} s"
    hours, minute = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minute:02d} min"
    days, hour = divmod(round(seconds / 3600), 24)
    return f"{days} d {hour} h"


def _summary(records: Sequence[Record]) -> list[list[str]]:
    def last(record: Record, key: str, form: str) -> str:
        curve = record.curve(key)
        return form.format(curve[-1][1]) if curve else "-"

    def least(record: Record, key: str) -> str:
        curve = record.curve(key)
        step, value = min(curve, key=lambda point: point[1], default=(0, 0.0))
        return f"{value:.4f} (step {step:,})" if curve else "-"

    def middle(record: Record, key: str, form: str) -> str:
        values = [value for _, value in record.curve(key)]
        return form.format(median(values)) if values else "-"

    def accuracy(record: Record, name: str) -> str:
        ends = [record.curve(f"{name}/{end}") for end in ("accuracy", "low", "high")]
        if not all(ends):
            return "-"
        (step, value), low, high = ends[0][-1], ends[1][-1][1], ends[2][-1][1]
        return f"{value:.4f}, 95% interval {low:.4f} to {high:.4f} (step {step:,})"

    def perplexity(record: Record, name: str) -> str:
        curves = [record.curve(f"{name}/{kind}") for kind in ("perplexity", "low", "high", "entropy")]
        if not all(curves):
            return "-"
        (step, value), (_, low), (_, high), (_, entropy) = (curve[-1] for curve in curves)
        within = f"95% interval {low:.4g} to {high:.4g}"
        return f"{value:.4g}, {within}, unigram entropy {entropy:.3f} nats (step {step:,})"

    def measured(suffix: str) -> list[str]:
        keys = {key for record in records for key in record.curves}
        return sorted(
            key.removesuffix(suffix) for key in keys if key.startswith("evaluation/") and key.endswith(suffix)
        )

    rows = [["", *(record.name for record in records)]]
    facts: list[tuple[str, Callable[[Record], str]]] = [
        ("branched from", lambda r: next((start.parent for start in r.history if start.parent), "-")),
        ("steps", lambda r: f"{r.last_step:,} of {r.settings['train.steps']:,}"),
        ("tokens", lambda r: last(r, "progress/tokens", "{:,}")),
        ("epochs", lambda r: last(r, "progress/epochs", "{:.2f}")),
        ("FLOPs", lambda r: f"{r.axes()['FLOPs'](r.last_step):.3g}".replace("e+", "e")),
        ("last loss", lambda r: last(r, "loss", "{:.4f}")),
        ("lowest held-out loss", lambda r: least(r, "held_out/loss")),
        ("lowest held-out loss, EMA weights", lambda r: least(r, "held_out/ema_loss")),
        *(
            (f"last accuracy on {name.partition('/')[2]}", lambda r, name=name: accuracy(r, name))
            for name in measured("/accuracy")
        ),
        *(
            (f"last perplexity of {name.partition('/')[2]}", lambda r, name=name: perplexity(r, name))
            for name in measured("/perplexity")
        ),
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


def _scores(records: Sequence[Record]) -> str:
    """Return the results of tools/evaluate.py."""

    def columns(score: Score) -> list[str]:
        of_items = [f"{score.items:,}", score.data, score.options]
        return [score.file, score.task, score.checkpoint, score.result, *of_items]

    rows = [["run", "file", "task", "checkpoint", "result", "items", "data", "options"]]
    rows += [[record.name, *columns(each)] for record in records for each in record.scores]
    return _table(row[len(records) == 1 :] for row in rows) if len(rows) > 1 else ""


def _differences(records: Sequence[Record]) -> str:
    keys = sorted({key for record in records for key in record.settings} - {"run_dir"})
    rows = [["setting", *(record.name for record in records)]]
    for key in keys:
        values = [in_yaml(r.settings[key]) if key in r.settings else "-" for r in records]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return _table(rows) if len(rows) > 1 else "<p>Only the run folder.</p>"


def _phases(record: Record) -> str:
    """Return the held-out figures at the last evaluation of each phase; nothing unless several have one."""
    first = [1, *(phase["first_step"] for phase in record.settings.get("data.phases") or [])]
    names = sorted(name for name in record.curves if name.startswith("held_out"))
    columns = []
    for phase, (start, end) in enumerate(itertools.pairwise([*first, record.last_step + 1])):
        last = {name: point for name in names for point in record.curve(name) if start <= point[0] < end}
        if last:
            step = max(step for step, _ in last.values())
            figures = [f"{last[name][1]:.4f}" if name in last else "-" for name in names]
            columns.append([f"phase {phase}", f"{step:,}", *figures])
    if len(columns) < 2:
        return ""
    return _table(zip(["", "last evaluation, step", *names], *columns, strict=True))


def _settings(record: Record) -> str:
    """Return the settings that differ from their defaults, and behind a click all of them."""
    usual = defaults()
    changed: list[Sequence[object]] = [("setting", "value", "default")]
    for key, value in record.settings.items():
        if value != usual.get(key):
            changed.append((key, in_yaml(value), in_yaml(usual[key]) if key in usual else "-"))
    every = [("setting", "value"), *((key, in_yaml(value)) for key, value in record.settings.items())]
    return (
        f"<p>These differ from their defaults:</p>{_table(changed)}"
        f"<details><summary>All {len(every) - 1} settings</summary>{_table(every)}</details>"
    )


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
            cells.append(duration(seconds) + of_all)
        rows.append([name, *cells])
    return rows


def _length(record: Record, start: Start) -> float:
    """Return the seconds that a process ran, up to its last known activity."""
    if start.ended is not None:
        return start.ended - start.started
    times = (moment for _, moment in record.curve("unix_time"))
    written = [moment for moment in times if moment >= start.started]  # only the latest start gets here
    return max(written, default=start.started) - start.started


def _starts(record: Record) -> str:
    """Return each start with its end, then the machines and command lines of consecutive starts alike."""
    if not record.history:
        return ""
    rows: list[list[object]] = [["", "started", "from step", "ranks", "steps lost before", "lasted", "end"]]
    for number, start in enumerate(record.history, 1):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start.started)) + " UTC"
        lasted = duration(_length(record, start))
        rows.append(
            [number, when, f"{start.step:,}", start.ranks, f"{start.lost_steps:,}", lasted, start.outcome]
        )
    content, first = _table(rows), 1
    for facts, alike in itertools.groupby(_place(start) for start in record.history):
        last = first + len(list(alike)) - 1
        which = f"start {first}" if first == last else f"starts {first} to {last}"
        content += _table([("", which), *facts]) if facts else ""
        first = last + 1
    return content


def _place(start: Start) -> list[tuple[str, str]]:
    """Return the machine and the command line of a start; empty in the history of an older version."""
    machine = start.machine
    if not machine:
        return []
    hosts = machine["hosts"]
    more = f" and {len(hosts) - _HOSTS:,} more" if len(hosts) > _HOSTS else ""
    ranks = (f"{count:,} × {name}" for name, count in machine["devices"].items())
    return [
        ("command", start.command),
        ("hosts", ", ".join(hosts[:_HOSTS]) + more),
        ("ranks", ", ".join(ranks)),
        ("CPUs of the first rank", f"{machine['cpus']} × {machine['cpu']}"),
        ("memory of its host", f"{machine['memory_gib']} GiB"),
        ("system", machine["system"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
    ]


def _skipped(record: Record) -> str:
    """Return the steps that the guard refused, and the rollbacks."""
    entries: list[list[object]] = [["step", "what"]]
    for entry in record.skipped:
        what = entry.get("problem") or (
            f"rolled back to step {entry['rollback_to']}, excluding {len(entry['excluded'])} examples"
        )
        entries.append([entry["step"], what])
    return _table(entries) if record.skipped else ""


def _texts(record: Record) -> str:
    last = max((text.step for text in record.texts), default=0)
    shown = [text for text in record.texts if text.step == last][:_TEXTS]
    return "".join(as_html(text) for text in shown)
