"""Accuracies during training are those that tools/evaluate.py finds in the checkpoints of the same steps."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoint.load_model import load_model
from pipeline.config import TaskConfig
from pipeline.decoding.batching import behind_prompts, stack, up_to_end
from pipeline.decoding.completing import complete
from pipeline.decoding.sampling import SamplingSettings
from pipeline.evaluation.intervals import wilson_interval
from pipeline.evaluation.tasks import TASKS
from pipeline.ranks import Ranks
from pipeline.training.filling import fill
from pipeline.training.scheduled import Tasks
from support.programs import Outcome, run_here
from support.runs import curve, metrics, train_on
from tools import evaluate

pytestmark = pytest.mark.slow

# Weights so large that the model is certain of something everywhere, now and then of the end-of-sequence
# token, and that no two confidences lie within the rounding of another batch.
LARGE = ("--model.init_std", "0.5")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return items that even an untrained model has partly right: the answers are single letters."""
    random, path = np.random.default_rng(3), tmp_path_factory.mktemp("items") / "items.jsonl"
    rows = [
        {"prompt": "".join(random.choice(list("abcdef"), random.integers(1, 6))), "answer": letter}
        for letter in "abcdefg" * 6
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def schedule(items: Path, **more: object) -> list[str]:
    task = {"task": "exact", "data": str(items), "interval": 4, "length": 1} | more
    return ["--evaluation.tasks", json.dumps([task]), "--evaluation.interval", "0"]


def found_in(checkpoint: str, items: Path, capture: pytest.CaptureFixture[str], *more: str) -> float:
    """Return the accuracy that tools/evaluate.py reports."""
    options = ["--checkpoint", checkpoint, "--task", "exact", "--data", str(items), "--length", "1", *more]
    outcome = run_here(evaluate.main, options, capture)
    [accuracy] = re.findall(r"^right ([0-9.]+) of", outcome.output, re.MULTILINE)
    return float(accuracy)


@pytest.mark.distributed
def test_under_zero3(data: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks, 41 items that do not divide, the averaged weights as by default, and the interval."""
    more = ["--optimizer.ema_decay", "0.6", "--train.steps", "8"]
    printed = train_on(2, data, tmp_path, *schedule(items, samples=41, interval=3, name="letters"), *more)
    accuracies = curve(tmp_path, "evaluation/letters/accuracy")
    assert [step for step, _ in accuracies] == [3, 6, 8]
    last = accuracies[-1][1]
    assert found_in(f"{tmp_path}:8", items, capsys, "--limit", "41") == pytest.approx(last, abs=5e-5)
    assert 0 < last < 1
    low, high = wilson_interval(round(last * 41), 41)
    assert curve(tmp_path, "evaluation/letters/low")[-1][1] == pytest.approx(low)
    assert curve(tmp_path, "evaluation/letters/high")[-1][1] == pytest.approx(high)
    assert f"step 8: evaluation/letters/accuracy {last:.4f} of 41 items" in printed
    names = [path.name for path in (tmp_path / "tensorboard").iterdir()]
    assert names


def test_answers_of_any_length(
    train: Callable[..., Outcome], data: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several tokens at a forward, as many as fit; the steps do not notice that they are measured."""
    corpus = data / "corpus.jsonl"
    several = schedule(corpus, length=None, tokens_per_step=3, samples=60)
    assert train(tmp_path / "measured", *LARGE, *several).code == 0
    assert train(tmp_path / "plain", *LARGE, "--evaluation.interval", "0").code == 0
    assert curve(tmp_path / "measured", "loss") == curve(tmp_path / "plain", "loss")
    options = ["--checkpoint", str(tmp_path / "plain"), "--task", "exact", "--data", str(corpus)]
    outcome = run_here(evaluate.main, [*options, "--tokens-per-step", "3"], capsys)
    steps, accuracies = zip(*curve(tmp_path / "measured", "evaluation/exact/accuracy"), strict=True)
    assert steps == (4, 8, 12, 16)
    assert f"right {accuracies[-1]:.4f} of 60 items" in outcome.output


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_answers_are_those_of_the_sampler(
    train: Callable[..., Outcome], data: Path, tmp_path: Path, at_once: int
) -> None:
    """What is behind an end-of-sequence token is left alone: filled in first, it would change the rest."""
    small = ["--train.steps", "2", *LARGE, "--evaluation.interval", "0"]
    assert train(tmp_path, *small).code == 0
    loaded = load_model(tmp_path, torch.device("cpu"))
    prompts = [json.loads(line)["prompt"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    sequences = behind_prompts(prompts, None, loaded.tokenizer, loaded.config)
    examples, masked = stack(loaded, sequences, range(len(prompts)))
    engine: Any = SimpleNamespace(evaluate=torch.no_grad()(loaded.model), ranks=Ranks())
    end = loaded.tokenizer.eos
    settings = SamplingSettings(tokens_per_step=at_once)
    found = fill(engine, examples, masked, loaded.layout, loaded.step, settings, stop=end)
    assert found is not None
    answers = [
        up_to_end(loaded.tokenizer, row[where].tolist()) for row, where in zip(found[0], masked, strict=True)
    ]
    expected = complete(loaded, prompts, settings)
    assert answers == [completion.tokens for completion in expected]
    assert 5 < sum(end in answer for answer in answers) < len(answers)


def test_prompts_without_room_count_as_wrong(
    train: Callable[..., Outcome], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in tools/evaluate.py; here those of more than 9 tokens, of 12."""
    rows = [{"prompt": "abcdef"[:n] * (1 + n // 4), "answer": "bcd"} for n in range(1, 7)] * 5
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = train(tmp_path / "run", *schedule(items, length=3))
    assert outcome.code == 0, outcome.error
    accuracies = curve(tmp_path / "run", "evaluation/exact/accuracy")
    assert "of 30 items, 10 without room for an answer" in outcome.output
    found = found_in(str(tmp_path / "run"), items, capsys, "--length", "3")
    assert found == pytest.approx(accuracies[-1][1], abs=5e-5)


def test_what_a_stop_cut_short_is_made_up_for(
    train: Callable[..., Outcome], items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops before a task is measured measures it after the resume, and no task twice."""

    def stop_at_8(tasks: Tasks) -> None:
        tasks.stop.agreed = tasks.state.step == 8

    with monkeypatch.context() as patch:
        patch.setattr(Tasks, "after_step", stop_at_8)
        assert train(tmp_path, *schedule(items)).code == 75
    for _ in range(2):
        assert train(tmp_path, *schedule(items)).code == 0
    measured = [line["step"] for line in metrics(tmp_path) if "evaluation/exact/accuracy" in line]
    assert measured == [8, 12, 16]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "chess"}, "evaluation.tasks"),
        ({"interval": 0}, r"evaluation.tasks\[0\].interval is 0: it must be above 0"),
        ({"samples": -1}, r"evaluation.tasks\[0\].samples is -1"),
        ({"length": 12}, "evaluation.tasks, .*items.jsonl: prompt 1 of .* sequence length 12"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"task": "sudoku"}, "items.jsonl, line 1: .* is no puzzle"),
        ({"intervall": 3}, "evaluation.tasks"),
    ],
)
def test_bad_tasks_are_refused_at_the_start(
    train: Callable[..., Outcome], items: Path, tmp_path: Path, task: dict[str, object], message: str
) -> None:
    complaint = train(tmp_path, *schedule(items, **task)).complaint()
    assert re.search(message, complaint), complaint


def test_two_tasks_need_two_names(train: Callable[..., Outcome], items: Path, tmp_path: Path) -> None:
    tasks = json.dumps([{"task": "exact", "data": str(items)}] * 2)
    complaint = train(tmp_path, "--evaluation.tasks", tasks).complaint()
    assert (
        "evaluation.tasks[1].name is None, but another task already has the curve evaluation/exact"
        in complaint
    )


def test_every_task_can_be_scheduled() -> None:
    """The names in the configuration, which imports nothing, are those of the tasks."""
    names = typing.get_args(typing.get_type_hints(TaskConfig)["task"])
    assert set(names) == {*TASKS, "generative-perplexity"}
