"""Generative perplexity during training is that of tools/evaluate.py on the checkpoints of the same steps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.scheduled import Tasks
from support.bigrams import bigram, write_bigram
from support.programs import Outcome, run_here
from support.runs import curve, metrics, train_on
from tools import evaluate, report

pytestmark = pytest.mark.slow

TASK = "generative-perplexity"
PLACE = f"evaluation/{TASK}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a causal model of transformers."""
    return write_bigram(tmp_path_factory.mktemp("bigram"), bigram())


def schedule(data: Path, scorer: Path, /, **more: object) -> list[str]:
    task = {"task": TASK, "data": str(data / "corpus.jsonl"), "interval": 8, "scorer": str(scorer)} | more
    return ["--evaluation.tasks", json.dumps([task]), "--evaluation.interval", "0"]


def found_in(
    checkpoint: str, data: Path, scorer: Path, output: Path, capture: pytest.CaptureFixture[str], *more: str
) -> dict[str, Any]:
    """Return the figures of tools/evaluate.py."""
    options = ["--checkpoint", checkpoint, "--task", TASK, "--data", str(data / "corpus.jsonl")]
    options += ["--scorer", str(scorer), "--temperature", "1", "--output", str(output), *more]
    assert run_here(evaluate.main, options, capture).code == 0
    figures: dict[str, Any] = json.loads(output.read_text())["figures"]
    return figures


def last_of(run_dir: Path) -> dict[str, float]:
    """Return the figures of the last measurement, by the names of their curves."""
    lines = [line for line in metrics(run_dir) if f"{PLACE}/perplexity" in line]
    return {k.removeprefix(f"{PLACE}/"): v for k, v in lines[-1].items() if k.startswith(PLACE)}


def check(measured: dict[str, float], expected: dict[str, Any]) -> None:
    """Compare all figures; measures of text need no tolerance but rounding's."""
    reference = {f"reference_{name}": expected["reference"][name] for name in ("perplexity", "entropy")}
    low, high = expected["perplexity_interval"]
    assert measured == pytest.approx(
        {name: expected[name] for name in measured if name in expected}
        | reference
        | {"low": low, "high": high},
        rel=1e-5,
    )
    assert {"perplexity", "entropy", "empty", "distinct_1", "distinct_2", "distinct_3"} < set(measured)


@pytest.mark.distributed
def test_under_zero3(data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks share 41 samples, which do not divide; the weights are the averaged ones, as by default."""
    more = ["--optimizer.ema_decay", "0.6", "--train.steps", "8"]
    printed = train_on(
        2, data, tmp_path / "run", *schedule(data, folder, samples=41, tokens_per_step=2), *more
    )
    options = ["--limit", "41", "--tokens-per-step", "2"]
    expected = found_in(f"{tmp_path / 'run'}:8", data, folder, tmp_path / "e.json", capsys, *options)
    found = last_of(tmp_path / "run")
    check(found, expected)
    assert f"step 8: {PLACE}/perplexity {found['perplexity']:.3f} of 41 samples, unigram entropy " in printed
    page = tmp_path / "report.html"
    assert run_here(report.main, [str(tmp_path / "run"), "--output", str(page)], capsys).code == 0
    assert f"last perplexity of {TASK}" in page.read_text()
    assert "perplexity of samples" in page.read_text(), "a chart"


def test_scored_by_a_run_of_ours(
    train: Callable[..., Outcome], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps do not notice that they are measured."""
    scorer = tmp_path / "scorer"
    causal = ["--objective.kind", "autoregressive", "--model.prediction", "shifted"]
    assert train(scorer, *causal, "--evaluation.interval", "0").code == 0
    assert train(tmp_path / "measured", *schedule(data, scorer, samples=20, length=5, name="x")).code == 0
    assert train(tmp_path / "plain", "--evaluation.interval", "0").code == 0
    assert curve(tmp_path / "measured", "loss") == curve(tmp_path / "plain", "loss")
    more = ["--limit", "20", "--length", "5"]
    expected = found_in(str(tmp_path / "plain"), data, scorer, tmp_path / "e.json", capsys, *more)
    steps, found = zip(*curve(tmp_path / "measured", "evaluation/x/perplexity"), strict=True)
    assert steps == (8, 16)
    assert found[-1] == pytest.approx(expected["perplexity"], rel=1e-5)


def test_a_scorer_that_is_lost_ends_no_run(
    train: Callable[..., Outcome], data: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stop cut short, or a fault, is measured after the resume."""
    scorer, measure = tmp_path / "scorer", Tasks.after_step
    shutil.copytree(folder, scorer)

    def lose(tasks: Tasks) -> None:
        if tasks.state.step == 16:
            (scorer / "model.safetensors").unlink(missing_ok=True)
        measure(tasks)

    with monkeypatch.context() as patch:
        patch.setattr(Tasks, "after_step", lose)
        outcome = train(tmp_path / "run", *schedule(data, scorer, samples=9))
    assert outcome.code == 0
    assert f"step 16: {PLACE} is not measured: evaluation.tasks[0].scorer {scorer} holds no" in outcome.output
    assert train(tmp_path / "run", *schedule(data, folder, samples=9)).code == 0
    assert [step for step, _ in curve(tmp_path / "run", f"{PLACE}/entropy")] == [8, 16]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"scorer": None}, r"evaluation.tasks\[0\].scorer is missing"),
        ({"scorer": "nowhere"}, r"evaluation.tasks\[0\].scorer: nowhere holds no checkpoint"),
        ({"task": "exact"}, r"evaluation.tasks\[0\].scorer is .*: it has no effect with task exact"),
        ({"prefix_length": -1}, r"evaluation.tasks\[0\].prefix_length is -1"),
        ({"prefix_length": 3}, r"evaluation.tasks\[0\].prefix_length is 3, but .* holds pairs"),
        ({"text_key": "prompt", "prefix_length": 11}, r"evaluation.tasks\[0\].data .* holds no document"),
        ({"data": "nowhere"}, r"evaluation.tasks\[0\].data is nowhere: there is no such file"),
    ],
)
def test_bad_tasks_are_refused_at_the_start(
    train: Callable[..., Outcome],
    data: Path,
    folder: Path,
    tmp_path: Path,
    task: dict[str, object],
    message: str,
) -> None:
    complaint = train(tmp_path, *schedule(data, folder, **task)).complaint()
    assert re.search(message, complaint), complaint
