"""The comparison of objectives: curves read as they are, and the whole of it once in small."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import plot_reproduction, reproduce, summarize_reproduction
from benchmarks.reproduction import questions
from benchmarks.reproduction.curves import Run, difference, reach, steps_ratio
from support.programs import run_here

pytestmark = pytest.mark.slow


def curve(*scores: float) -> Run:
    """Return a curve with a point every 100 steps."""
    return [
        {"step": 100.0 * n, "solved_1": score, "flops": 1e12 * n * n}
        for n, score in enumerate(scores, start=1)
    ]


@pytest.mark.parametrize(
    ("scores", "target", "steps"),
    [
        ((0.2, 0.4, 0.8), 0.4, 200.0),
        ((0.2, 0.4, 0.8), 0.5, 225.0),
        ((0.2, 0.4, 0.8), 0.1, 50.0),
        ((0.2, 0.8, 0.1, 0.9), 0.5, 150.0),
        ((0.2, 0.4), 0.5, None),
    ],
)
def test_the_way_to_a_target_is_linear_between_points(
    scores: tuple[float, ...], target: float, steps: float | None
) -> None:
    assert reach(curve(*scores), target, "solved_1") == (None if steps is None else pytest.approx(steps))


def test_other_costs_are_read_at_the_same_place() -> None:
    """Half way between 1e12 and 4e12."""
    assert reach(curve(0.2, 0.8), 0.5, "solved_1", "flops") == pytest.approx(2.5e12)


@pytest.mark.usefixtures("forked_trainings")
def test_the_comparison_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An objective, a few steps: a row a checkpoint, the costs as they must be, tables and a figure."""
    table, figure = tmp_path / "scores.csv", tmp_path / "figure.png"
    sizes = "--task sudoku4 --count 2500 --items 6 --curve-items 4 --steps 4 --interval 2 --seeds 5"
    tiny = "model.layers=1 model.hidden_size=32 schedule.warmup_steps=1 train.log_interval=2 monitor.texts=0"
    rates = ["--learning-rates", "2e-3", "0.1"]
    arguments = [*sizes.split(), "--variants", "puma_turns", *rates, "--set", *tiny.split()]
    places = ["--folder", str(tmp_path / "runs"), "--output", str(table)]
    for _ in range(2):  # the second time nothing is left to do
        outcome = run_here(reproduce.main, [*arguments, *places], capsys)
        assert outcome.code == 0, outcome.error
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["step"], row["items"]) for row in rows] == [
        ("puma_turns_2e-3", "2", "4"),
        ("puma_turns_2e-3", "4", "6"),
        ("puma_turns_0.1", "2", "4"),
        ("puma_turns_0.1", "4", "6"),
    ]
    assert [int(row["tokens"]) for row in rows] == [64 * 32 * 2, 64 * 32 * 4] * 2
    assert [int(row["unique_samples"]) for row in rows] == [128, 256] * 2
    for rate in ("2e-3", "0.1"):
        run = tmp_path / f"runs/puma_turns_{rate}_5/config.yaml"
        assert f"learning_rate: {float(rate)}\n" in run.read_text()
    assert float(rows[1]["flops"]) == pytest.approx(2 * float(rows[0]["flops"]), rel=0.05)
    assert all((row["solved_4"] != "") == (row["step"] == "4") for row in rows)
    drawn = run_here(plot_reproduction.main, ["--scores", str(table), "--figure", str(figure)], capsys)
    assert drawn.code == 0, drawn.error
    assert "| puma_turns_2e-3 | 1 | 4 |" in drawn.output
    assert figure.stat().st_size > 10_000
    named = [f"{table}:solved_1:0.5", "--baseline", "puma_turns_0.1"]
    summed = run_here(summarize_reproduction.main, named, capsys)
    assert "| scores | puma_turns_2e-3 | 1 | ?1.00 |" in summed.output


@pytest.mark.usefixtures("forked_trainings")
def test_the_comparison_on_questions_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last records that fit are held out, and what is too long is left out of both files."""
    sums = [
        {"question": f"{a} and {b}?", "answer": f"It is {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
        for a in range(10)
        for b in range(10)
    ]
    sums[-1]["question"] *= 20
    text, table = tmp_path / "sums.jsonl", tmp_path / "scores.csv"
    text.write_text("".join(json.dumps(record) + "\n" for record in sums), encoding="utf-8")
    sizes = "--vocabulary 320 --held-out 9 --items 8 --curve-items 3 --steps 2 --interval 1 --seeds 5"
    tiny = "model.layers=1 model.hidden_size=32 schedule.warmup_steps=1 train.log_interval=1 monitor.texts=0"
    places = [
        "--task",
        "questions",
        "--input",
        str(text),
        "--folder",
        str(tmp_path / "runs"),
        "--output",
        str(table),
    ]
    arguments = [*sizes.split(), "--variants", "random", *places, "--set", *tiny.split()]
    outcome = run_here(reproduce.main, arguments, capsys)
    assert outcome.code == 0, outcome.error
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["items"], row["format_1"] != "") for row in rows] == [
        ("1", "3", False),
        ("2", "8", True),
    ]
    kept = {name: (tmp_path / "runs" / f"{name}.jsonl").read_text() for name in ("train", "held_out")}
    lines = {name: [json.loads(line) for line in content.splitlines()] for name, content in kept.items()}
    assert lines == {"train": sums[:91], "held_out": sums[91:99]}


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ("He has 2+3=<<2+3=5>>5 apples.\n#### 5", True),
        ("That is 1000 * 1.5.\nSo 1500.\n#### 1,500.50", True),
        ("It fell.\n#### -3", True),
        ("#### 5", False),
        ("He has 5 apples. #### 5", False),
        ("He has 5 apples.\n#### 5 apples", False),
        ("He has 5 apples.\n#### ", False),
        ("He has\n#### 5\n#### 5", False),
    ],
)
def test_the_format_of_an_answer(answer: str, fits: bool) -> None:
    assert (questions.FORMAT.fullmatch(answer) is not None) == fits


def test_an_unknown_setting_stops_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "sudoku4", "--set", "steps", "--folder", str(tmp_path / "runs")]
    outcome = run_here(reproduce.main, arguments, capsys)
    assert "KEY=VALUE" in outcome.complaint()
    assert not (tmp_path / "runs").exists()


def test_a_score_that_is_better_when_lower() -> None:
    points = [{"step": 100.0 * n, "bound": bound} for n, bound in enumerate((9.0, 7.0, 3.0), start=1)]
    assert reach(points, 5.0, "bound") == pytest.approx(250)
    assert reach(points, 10.0, "bound") == 100
    assert reach(points, 2.0, "bound") is None


def test_ratios_are_of_the_same_seeds_and_say_who_did_not_arrive() -> None:
    """Steps to 0.5: 100, 150 against 200, 300; seed 3 has no baseline. Then neither arrives at 0.9."""
    runs = {
        "a": {"1": curve(0.5, 0.8, 0.8), "2": curve(0.4, 0.6, 0.8), "3": curve(0.1, 0.1, 0.1)},
        "b": {"1": curve(0.2, 0.5, 0.6), "2": curve(0.2, 0.3, 0.5)},
    }
    ratio, sign = steps_ratio(runs, "a", "b", "solved_1", 0.5)
    assert (ratio.value, sign) == (pytest.approx(250 / 500), "")
    assert (ratio.low, ratio.high) == pytest.approx((0.5, 0.5))  # of both seeds alone
    assert steps_ratio(runs, "a", "b", "solved_1", 0.7)[1] == "<"
    assert steps_ratio(runs, "a", "b", "solved_1", 0.9)[1] == "?"
    assert steps_ratio(runs, "b", "a", "solved_1", 0.7)[1] == ">"
    assert difference(runs, "a", "b", "solved_1") == pytest.approx((0.25, 0.2, 0.3))
    runs["a"] = {seed: points[:2] for seed, points in runs["a"].items()}
    assert difference(runs, "a", "b", "solved_1") == pytest.approx((0.3, 0.3, 0.3))  # at step 200
    runs["a"] = {"1": [{"step": 50.0, "solved_1": 1.0}]}
    assert difference(runs, "a", "b", "solved_1") is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--task", "text"], "--input"),
        (["--task", "sudoku4", "--input", "text.jsonl"], "--input"),
        (["--task", "sudoku4", "--vocabulary", "9"], "--vocabulary"),
        (["--task", "sudoku4", "--variants", "pumas"], "pumas"),
    ],
)
def test_what_does_not_belong_to_a_task(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_here(reproduce.main, [*arguments, "--folder", str(tmp_path / "runs")], capsys)
    assert named in outcome.complaint()
    assert not (tmp_path / "runs").exists()
