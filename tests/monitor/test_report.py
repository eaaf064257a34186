"""The report of runs: what it says, that it is one sound file, and what it does with bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.monitor.charts import HEIGHT, WIDTH, line_chart, palette, short, thinned, ticks
from pipeline.monitor.history import KILLED, noted, read_history
from pipeline.monitor.report import read_record
from pipeline.resilience.skipped import SKIPPED_FILE
from support.programs import Outcome, run_here
from support.runs import curve, metrics
from tools import report as program

Report = Callable[..., Outcome]
VOID = {"meta", "br", "line", "polyline", "circle"}


class Page(HTMLParser):
    """A page that must be well-formed: its texts, tables and tags."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.rows: list[list[str]] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attrs:
            assert name not in ("src", "href"), f"{tag} loads {value}"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """Return the cells behind the first one of that name."""
        return next(row[1:] for row in self.rows if row and row[0] == name)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Return a function that runs the tool."""
    return lambda *arguments: run_here(program.main, [str(argument) for argument in arguments], capsys)


def test_the_page_says_what_the_run_wrote(report: Report, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "new/report.html"
    assert report(run_dir, "--output", output).code == 0
    content = output.read_text()
    assert "http" not in content
    page = Page(content)
    assert page.row("steps") == ["16 of 16"]
    assert page.row("tokens") == [f"{16 * 16 * 12:,}"]
    assert page.row("last loss") == [f"{curve(run_dir, 'loss')[-1][1]:.4f}"]
    step, best = min(curve(run_dir, "held_out/loss"), key=lambda point: point[1])
    assert page.row("lowest held-out loss") == [f"{best:.4f} (step {step})"]
    flops = sum(value * 4 for _, value in curve(run_dir, "progress/flops_per_step"))
    assert float(page.row("FLOPs")[0]) == pytest.approx(flops, rel=1e-2)
    assert page.row("starts") == ["2"]
    assert page.row("objective.threshold") == ["0.3"]
    starts = [row for row in page.rows if row[-1] == "done"]
    assert [row[1:4] for row in starts] == [["0", "1", "0"], ["12", "1", "4"]]
    assert page.count["svg"] >= 10
    assert page.count["b"] > 0, "tokens of the texts"
    assert len(content) < 300_000


def test_several_runs_are_compared(report: Report, run_dir: Path, tmp_path: Path) -> None:
    """By settings that differ and over steps, tokens, FLOPs and hours; unlike folders of one name."""
    other = tmp_path / "other/run"
    shutil.copytree(run_dir, other)
    config = (other / "config.yaml").read_text().replace("threshold: 0.3", "threshold: 0.5")
    (other / "config.yaml").write_text(config)
    (other / SKIPPED_FILE).write_text(
        '{"step": 3, "problem": "the loss is <not> finite", "samples": [1]}\n'
        '{"step": 5, "rollback_to": 4, "excluded": [1, 2]}\n'
    )
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')  # it is still running
    assert report(run_dir, other, "--output", tmp_path / "report.html").code == 0
    content = (tmp_path / "report.html").read_text()
    page = Page(content)
    assert page.row("objective.threshold") == ["0.3", "0.5"]
    assert page.row("skipped steps") == ["0", "1"]
    assert ["3", "the loss is <not> finite"] in page.rows
    assert ["5", "rolled back to step 4, excluding 2 examples"] in page.rows
    for axis in ("steps", "tokens", "FLOPs", "hours"):
        assert f">{axis}</text>" in content
    differing = content[content.index("Settings that differ") : content.index("<h2>Time")]
    assert differing.count("<tr>") == 2, "the heading and the threshold"


def test_the_axes(run_dir: Path) -> None:
    """Tokens, FLOPs and hours at a step are the sums of what was recorded up to it."""
    axes = read_record(run_dir, "run").axes()
    lines = metrics(run_dir)
    assert axes["tokens"](5) == 5 * 16 * 12
    flops = [line["progress/flops_per_step"] * 4 for line in lines if "progress/flops_per_step" in line]
    assert axes["FLOPs"](8) == pytest.approx(sum(flops[:2]))
    assert axes["FLOPs"](10) == pytest.approx(sum(flops[:2]) + flops[2] / 2)
    times = ("time/training", "time/evaluation", "time/checkpoint_stall")
    seconds = sum(line.get(key, 0) for line in lines for key in times)
    assert axes["hours"](16) == pytest.approx(seconds / 3600)


def test_where_the_time_went(report: Report, run_dir: Path, tmp_path: Path) -> None:
    """The parts, those of the training's own not counted again, come to the life of the processes."""
    record = read_record(run_dir, "run")
    parts = [record.total(f"time/{name}") for name in ("training", "evaluation", "checkpoint_stall")]
    alive = sum((start.ended or 0) - start.started for start in record.history)
    assert 0 < sum(parts) < alive
    assert report(run_dir, "--output", tmp_path / "report.html").code == 0
    page = Page((tmp_path / "report.html").read_text())
    names = ("training", "evaluation", "checkpoint stall", "start-up, lost steps, shutdown")
    shares = [float(re.search(r"\((.*)%\)", page.row(name)[0]).group(1)) for name in names]  # type: ignore[union-attr]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert shares[0] == pytest.approx(100 * parts[0] / alive, abs=0.1)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["metrics.jsonl", "run_dir"]),
        ("", ["no step yet", "train.log_interval"]),
        ('{"step": 1, "loss": 2.0}\nnonsense\n', ["metrics.jsonl, line 2", "not valid JSON"]),
    ],
)
def test_bad_input_is_one_line(
    report: Report, run_dir: Path, tmp_path: Path, content: str | None, parts: list[str]
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(run_dir / "config.yaml", bad)
    if content is not None:
        (bad / "metrics.jsonl").write_text(content)
    complaint = report(run_dir, bad, "--output", tmp_path / "report.html").complaint()
    for part in [str(bad), *parts]:
        assert part in complaint
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_is_given_twice(report: Report, run_dir: Path) -> None:
    assert "given twice" in report(run_dir, run_dir).complaint()


def test_an_end_that_cannot_be_noted_changes_no_exit_code(tmp_path: Path) -> None:
    """The disk is full, and the run has been saved before: it must not count as failed."""
    with noted(tmp_path, 0, 2, 0, 0.0, {}, lambda: "done"):
        (tmp_path / "history.jsonl").unlink()
        (tmp_path / "history.jsonl").mkdir()


def test_history_tells_how_each_start_ended(tmp_path: Path) -> None:
    """Done, failed, or killed: then half a line may be left."""
    with noted(tmp_path, 0, 2, 0, 0.0, {}, lambda: "done"):
        pass
    with pytest.raises(RuntimeError), noted(tmp_path, 5, 2, 3, 0.0, {}, lambda: "done"):
        raise RuntimeError("out of memory")
    killed = noted(tmp_path, 6, 4, 0, 0.0, {}, lambda: "never asked")
    killed.__enter__()
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"ended": 17')
    with noted(tmp_path, 7, 4, 1, 4e9, {}, lambda: "stopped"):
        running = read_history(tmp_path)
    starts = read_history(tmp_path)
    assert [start.outcome for start in starts] == [
        "done",
        "RuntimeError: out of memory",
        KILLED,
        "stopped",
    ]
    assert [(s.step, s.ranks, s.lost_steps) for s in starts] == [(0, 2, 0), (5, 2, 3), (6, 4, 0), (7, 4, 1)]
    assert starts[2].ended == 4e9, "the last sign of life"
    assert running[3].ended is None
    assert json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])["ranks"] == 2
    assert read_history(tmp_path / "nowhere") == []
    killed.gen.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (0.31, 0.3104), (1e18, 9e18), (-5, -4.9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in found)
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125"
    assert np.diff(found) == pytest.approx(step, rel=1e-6)


def test_charts_show_their_points() -> None:
    """Read back from the SVG, the points are the values; what is not finite is left out."""
    values = [(0.0, 10.0), (50.0, 20.0), (75.0, float("nan")), (100.0, 15.0)]
    chart = line_chart("a <title>", "steps", {"one": values, "empty": []})
    assert "a &lt;title&gt;" in chart
    [path] = re.findall(r'points="([^"]+)"', chart)
    points = [tuple(map(float, point.split(","))) for point in path.split()]
    assert len(points) == 3
    xs, ys = np.array(points).T
    assert np.polyfit([0, 50, 100], xs, 1)[0] > 0
    assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(0.5, abs=1e-3)
    assert (ys[0] - ys[2]) / (ys[0] - ys[1]) == pytest.approx(0.5, abs=1e-2)
    assert 0 < xs.min() < xs.max() < WIDTH
    assert 0 < ys.min() < ys.max() < HEIGHT
    assert line_chart("nothing", "steps", {"empty": []}) == ""
    assert "<circle" in line_chart("one point", "steps", {"one": [(3, 4)]})


def test_every_curve_has_a_colour_of_its_own() -> None:
    for count in (1, 2, 8, 9, 40):
        for ordered in (False, True):
            assert len(set(palette(count, ordered))) == count


def test_long_curves_are_thinned_by_means() -> None:
    curve = [(float(i), float(i % 2)) for i in range(1000)]
    found = thinned(curve, 100)
    assert len(found) == 100
    assert found[0] == (4.5, 0.5)
    assert [short(value) for value in (0, 0.05, 1500, 25000, 3e6, 2.5e9, 1e20)] == [
        "0", "0.05", "1500", "25k", "3M", "2.5G", "1e+20",
    ]  # fmt: skip
