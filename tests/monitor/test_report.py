"""The report of runs: what it says, that it is one sound file, and what it does with bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import pytest

from pipeline.config.load import flatten
from pipeline.monitor.charts import chart_data, palette, thinned
from pipeline.monitor.history import KILLED, noted, read_history
from pipeline.monitor.report import duration
from pipeline.monitor.run_record import Record, read_record
from pipeline.resilience.skipped import SKIPPED_FILE
from support.programs import Outcome, run_here
from support.runs import curve, metrics
from tools import evaluate
from tools import report as program

Report = Callable[..., Outcome]
VOID = {"meta", "br", "input"}


class Page(HTMLParser):
    """A page that must be well-formed: its tables, tags and the data of its charts."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
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
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def row(self, name: str) -> list[str]:
        """Return the cells behind the first one of that name."""
        return next(row[1:] for row in self.rows if row and row[0] == name)

    @property
    def data(self) -> dict[str, Any]:
        """The data of the charts."""
        return json.loads(self.scripts[0])


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
    assert ["objective.threshold", "0.3", "null"] in page.rows, "beside its default"
    assert ["objective.threshold", "0.3"] in page.rows, "among all settings"
    starts = [row for row in page.rows if row[-1] == "done"]
    assert [row[2:5] for row in starts] == [["0", "1", "0"], ["12", "1", "4"]]
    assert page.count["figure"] == len(page.data["charts"]) >= 15
    assert page.count["b"] > 0, "tokens of the texts"
    assert len(content) < 300_000


def test_charts_show_the_metrics(report: Report, run_dir: Path, tmp_path: Path) -> None:
    """Every line of every chart has the values of metrics.jsonl, and every binned metric has its lines."""
    assert report(run_dir, "--output", tmp_path / "report.html").code == 0
    data = Page((tmp_path / "report.html").read_text()).data
    written: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(run_dir):
        for name, value in flatten(line).items():
            written.setdefault(name, []).append((line["step"], value))
    shown: set[str] = set()
    for chart in data["charts"]:
        family = chart["title"].replace(" ", "_")
        for line in chart["lines"]:
            name = line["label"] if line["label"] in written else f"{family}.{line['label']}"
            points = [value for point in written[name] for value in point]
            pairs = zip(line["x"], line["y"], strict=True)
            assert [value for pair in pairs for value in pair] == pytest.approx(points, rel=1e-6), name
            assert line["each"] == 1
            shown.add(name)
    assert {"loss", "held_out/ema_loss", "gradient_norm", "loss_by_stage.03"} <= shown
    binned = {name for name in written if name.startswith(("loss_by_", "accuracy_by_"))}
    assert binned <= shown
    [axes] = data["runs"].values()
    assert axes["warmup"] == 2
    assert axes["tokens"] == [step * 16 * 12 for step in axes["steps"]]
    assert axes["hours"] == pytest.approx(
        list(map(read_record(run_dir, "run").axes()["hours"], axes["steps"]))
    )


def test_machine_and_command_of_each_start(report: Report, run_dir: Path, tmp_path: Path) -> None:
    """Both starts were on this machine by this process; an older history tells of neither."""
    for start in read_history(run_dir):
        assert shlex.split(start.command) == psutil.Process().cmdline()
        assert start.machine["hosts"] == [socket.gethostname()]
        assert start.machine["devices"] == {"CPU": 1}
        assert start.machine["versions"]["torch"] == version("torch")
    assert report(run_dir, "--output", tmp_path / "report.html").code == 0
    page = Page((tmp_path / "report.html").read_text())
    assert ["", "starts 1 to 2"] in page.rows
    assert page.row("hosts") == [socket.gethostname()]
    assert page.row("ranks") == ["1 × CPU"]
    assert page.row("command") == [shlex.join(psutil.Process().cmdline())]
    old = tmp_path / "old"
    shutil.copytree(run_dir, old)
    (old / "history.jsonl").write_text(
        '{"started": 1.0, "step": 0, "ranks": 2, "lost_steps": 0, "last_sign": 0.0}\n'
    )
    assert report(old, "--output", tmp_path / "old.html").code == 0
    assert not [row for row in Page((tmp_path / "old.html").read_text()).rows if row[0] == "hosts"]


def test_scores_of_a_run(
    report: Report, run_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What tools/evaluate.py wrote to RUN/evaluation, and whether it still tells of the run's checkpoint."""
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    common = ["--checkpoint", str(copy), "--data", str(data / "corpus.jsonl"), "--limit", "4"]
    for task, name in (("exact", "answers.json"), ("likelihood", "bound.json")):
        more = ["--draws", "2"] if task == "likelihood" else ["--temperature", "0.5"]
        output = str(copy / "evaluation" / name)
        outcome = run_here(evaluate.main, [*common, "--task", task, "--output", output, *more], capsys)
        assert outcome.code == 0, outcome.stderr
    (copy / "evaluation/other.json").write_text('{"results": {}}')

    def rows() -> dict[str, list[str]]:
        assert report(copy, "--output", tmp_path / "report.html").code == 0
        page = Page((tmp_path / "report.html").read_text())
        return {name: page.row(name) for name in ("answers.json", "bound.json", "other.json")}

    answers = json.loads((copy / "evaluation/answers.json").read_text())["figures"]
    bound = json.loads((copy / "evaluation/bound.json").read_text())["figures"]
    low, high = answers["interval"]
    task, checkpoint, result, items, file, options = rows()["answers.json"]
    assert (task, checkpoint, items, file) == ("exact", "step 16", "4", str(data / "corpus.jsonl"))
    assert result == f"accuracy {answers['accuracy']:.4f}, 95% interval {low:.4f} to {high:.4f}"
    assert {"--temperature 0.5", "--seed 0"} <= set(re.findall(r"--\S+ [\d.]+", options))
    task, checkpoint, result, items, _, options = rows()["bound.json"]
    assert (task, items) == ("likelihood", "4")
    assert f"{bound['nll']:.4f} nats per sequence" in result
    assert "--draws 2" in options
    assert rows()["other.json"][2] == "holds no results of tools/evaluate.py"
    with (copy / "checkpoints/step_00000016/manifest.json").open("a") as manifest:
        manifest.write("\n")
    assert rows()["bound.json"][1] == "step 16 (not the run's checkpoint of that name)"
    shutil.rmtree(copy / "checkpoints/step_00000016")
    assert rows()["bound.json"][1] == "step 16 (no longer in the run)"


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
    losses = next(chart for chart in page.data["charts"] if chart["title"] == "loss: held_out/loss")
    names = [line["label"] for line in losses["lines"]]
    assert names == [f"{run_dir.parent.name}/run", "other/run"] == list(page.data["runs"])
    assert len({line["colour"] for line in losses["lines"]}) == 2
    for axis in ("steps", "tokens", "FLOPs", "hours"):
        assert f"<option>{axis}</option>" in content
        assert axis in page.data["runs"]["other/run"]
    assert sum(chart["title"].startswith("loss by stage: ") for chart in page.data["charts"]) == 2
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


def test_names_cannot_leave_the_data(report: Report, run_dir: Path, tmp_path: Path) -> None:
    name = "a</script><b>run"
    shutil.copytree(run_dir, tmp_path / name.replace("/", "_"))
    metrics_file = tmp_path / name.replace("/", "_") / "metrics.jsonl"
    metrics_file.write_text(metrics_file.read_text().replace("held_out/ema_loss", "held_out/</script>"))
    assert report(metrics_file.parent, "--output", tmp_path / "report.html").code == 0
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.scripts) == 2
    assert "held_out/</script>" in [line["label"] for chart in page.data["charts"] for line in chart["lines"]]


def test_every_curve_has_a_colour_of_its_own() -> None:
    for count in (1, 2, 8, 9, 40):
        for ordered in (False, True):
            assert len(set(palette(count, ordered))) == count


def test_long_curves_are_thinned_by_means() -> None:
    curve = [(float(i), float(i % 2)) for i in range(1000)]
    found, each = thinned([*curve, (1001.0, float("nan"))], 100)
    assert len(found) == 100
    assert found[0] == (4.5, 0.5)
    assert each == 10


def test_the_page_of_a_long_run_stays_small(run_dir: Path) -> None:
    """Four runs of 20,000 steps with 64 stages: the data of the charts is below 2 MB, and no line is lost."""
    values = np.random.default_rng(0).normal(size=20_000).tolist()
    long = list(enumerate(values, 1))
    bins = {f"loss_by_stage/{stage:02d}": long for stage in range(64)}
    base = read_record(run_dir, "run")
    curves = {**dict.fromkeys(base.curves, long), **bins}
    records = [Record(f"run {i}", base.settings, curves, base.binned, [], [], [], []) for i in range(4)]
    _, data = chart_data(records)
    assert len(orjson.dumps(data)) < 2_000_000
    assert sum(len(chart["lines"]) for chart in data["charts"]) > 4 * 64
    assert all(len(line["y"]) > 50 for chart in data["charts"] for line in chart["lines"])


def test_durations_are_readable() -> None:
    seconds = (0, 4.24, 59.96, 65, 3599.7, 3600, 7260, 86399, 90000, 400000)
    assert [duration(each) for each in seconds] == [
        "0.0 s", "4.2 s", "1 min 00 s", "1 min 05 s", "1 h 00 min", "1 h 00 min", "2 h 01 min", "1 d 0 h",
        "1 d 1 h", "4 d 15 h",
    ]  # fmt: skip
