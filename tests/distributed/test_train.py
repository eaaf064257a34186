"""The main program as users run it: resume bit for bit, curves, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.base.errors import UserError
from pipeline.config.load import flatten
from pipeline.engine.deepspeed import read_deepspeed_json
from pipeline.monitor.texts import read_texts
from support.forked import run_forked, torchrun
from support.programs import Outcome
from support.runs import command, curve, metrics, not_measured, train_on
from tools import train_tokenizer

pytestmark = pytest.mark.distributed

Train = Callable[..., Outcome]
# Chains that do not ask the model, and weights so large that no two confidences of a text nearly tie: another
# number of ranks rounds differently.
ANY_ROUNDING = ("--objective.policy", "random", "--model.init_std", "0.5")


def test_resume_is_bit_for_bit(train: Train, tmp_path: Path) -> None:
    """A run that loses everything after a checkpoint repeats the uninterrupted run exactly.

    The threshold makes chains of different lengths, so cursors differ from slot to slot. On several ranks
    test_kill.py says the same.
    """

    def run(run_dir: Path) -> str:
        return train(run_dir, "--objective.threshold", "0.12").output

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    run(parts)
    for step in (12, 16):  # as if killed between steps 8 and 12: later checkpoints never came to be
        (parts / "checkpoints" / f"step_{step:08d}").rename(tmp_path / f"lost_{step}")
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')  # half a line of the killed process
    output = run(parts)
    assert "resumed from" in output
    assert "step 8" in output
    one, two = ([not_measured(line) for line in metrics(run_dir)] for run_dir in (parts, whole))
    assert one == two
    assert [step for step, _ in curve(parts, "loss")] == list(range(1, 17))
    slots = [np.load(run_dir / "checkpoints/step_00000016/slots_00000.npz") for run_dir in (whole, parts)]
    assert len(set(slots[0]["cursors"].tolist())) > 1, "chains of equal length would prove little"
    for key in slots[0].files:
        np.testing.assert_array_equal(slots[0][key], slots[1][key])


def test_launchers_agree(data: Path, tmp_path: Path) -> None:
    """torchrun and the deepspeed launcher start the same run, to the last bit."""
    starts = {
        "torchrun": (*torchrun(2), "-m"),
        "deepspeed": ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"),
    }
    for launcher, start in starts.items():
        arguments = command(data, tmp_path / launcher, "--train.steps", "8")
        result = run_forked(*start, "pipeline.train", *arguments)
        assert result.returncode == 0, result.stderr
    losses = curve(tmp_path / "torchrun", "loss")
    assert len(losses) == 8
    assert losses == curve(tmp_path / "deepspeed", "loss")


def test_tensorboard_has_the_curves_once(train: Train, tmp_path: Path) -> None:
    """TensorBoard's own reader finds every curve, and after a resume no step twice."""
    run_dir = tmp_path / "run"
    assert train(run_dir).code == 0
    (run_dir / "checkpoints/step_00000016").rename(tmp_path / "lost")
    assert train(run_dir).code == 0
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    names = "loss learning_rate gradient_norm tokens_per_second samples_per_second masked_fraction mean_stage"
    for name in [f"train/{name}" for name in names.split()] + ["held_out/loss"]:
        assert name in events.Tags()["scalars"], name
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 17))
    from_events = [event.value for event in events.Scalars("train/loss")]
    assert from_events == pytest.approx([value for _, value in curve(run_dir, "loss")])


def test_plain_lines_without_a_terminal(train: Train, tmp_path: Path) -> None:
    """A log file gets lines with rate and time left, and no control characters."""
    outcome = train(tmp_path / "run")
    lines = [line for line in outcome.output.splitlines() if line.startswith("step 8/16")]
    assert len(lines) == 1
    assert "step/s" in lines[0]
    assert "left" in lines[0]
    assert not set("\r\x1b") & set(outcome.output + outcome.error)


def test_held_out_loss_does_not_depend_on_ranks(data: Path, train: Train, tmp_path: Path) -> None:
    """The same model on the same masks, 11 examples that do not divide by the batches: 1 and 2 ranks.

    Nor does any other figure that is no measured time.
    """
    more = [*ANY_ROUNDING, "--evaluation.samples", "11", "--evaluation.bound_draws", "2"]
    assert train(tmp_path / "1", *more).code == 0
    train_on(2, data, tmp_path / "2", *more)
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert flatten(not_measured(one)) == pytest.approx(flatten(not_measured(two)), rel=1e-3, abs=1e-5)
    texts = read_texts(tmp_path / "1")
    assert len(texts) == 4
    assert texts == read_texts(tmp_path / "2")
    for key in ("held_out/loss", "held_out/bound"):
        one, two = ([value for _, value in curve(tmp_path / n, key)] for n in ("1", "2"))
        assert len(one) == 2
        assert one == pytest.approx(two, abs=1e-5)


def test_ranks_that_share_sequences_count_once(data: Path, train: Train, tmp_path: Path) -> None:
    """Sequence parallelism changes no curve, neither losses nor what is counted; a run may go on without."""
    assert train(tmp_path / "1", *ANY_ROUNDING).code == 0
    train_on(2, data, tmp_path / "2", *ANY_ROUNDING, "--engine.sequence_parallel_size", "2")
    for step in (12, 16):
        (tmp_path / f"2/checkpoints/step_{step:08d}").rename(tmp_path / f"lost_{step}")
    assert "step 8" in train_on(2, data, tmp_path / "2", *ANY_ROUNDING)
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert flatten(not_measured(one)) == pytest.approx(flatten(not_measured(two)), rel=1e-3, abs=1e-5)


def test_only_the_newest_checkpoints_are_kept(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--checkpoint.keep", "2").code == 0
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step_00000012", "step_00000016"]


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--data.tokenizer", "nowhere"], ["nowhere", "train_tokenizer"]),
        (["--data.prefixes", "[nowhere]"], ["nowhere", "preprocess_data"]),
        (["--data.kind", "packed"], ["holds pairs", "data.kind", "'pairs'"]),
        (["--data.sequence_length", "5"], ["data.sequence_length = 5", "document", "raise"]),
        (["--model.vocab_size", "4"], ["model.vocab_size is 4", "tokens"]),
        (["--data.split", "100,0,0"], ["data.split", "evaluation.interval"]),
        (["--engine.device", "cuda"], ["engine.device", "'cpu'"]),
        (["--engine.kind", "deepspeed", "--engine.deepspeed_config", "nowhere.json"], ["nowhere.json"]),
        (["--engine.kind", "deepspeed", "--engine.sequence_parallel_size", "2"], ["number of ranks, 1"]),
        (["--train.stepz", "3"], ["'train.stepz'", "'train.steps'"]),
    ],
)
def test_bad_input_is_one_line(train: Train, tmp_path: Path, more: list[str], parts: list[str]) -> None:
    """Exit code 2 and the thing with its remedy."""
    complaint = train(tmp_path / "run", *more).complaint()
    for part in parts:
        assert part in complaint


def test_too_long_pairs_can_be_dropped(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--data.sequence_length", "8", "--data.too_long", "drop").code == 0


def test_another_tokenizer_is_refused(train: Train, data: Path, tmp_path: Path) -> None:
    """Data of one tokenizer and a model of another never meet."""
    other = str(tmp_path / "tokenizer")
    train_tokenizer.main(
        ["--input", str(data / "corpus.jsonl"), "--text-key", "prompt", "--vocab-size", "16",
         "--model-type", "char", "--output", other]
    )  # fmt: skip
    assert "another tokenizer" in train(tmp_path / "run", "--data.tokenizer", other).complaint()


def test_a_resume_that_changes_the_run_is_refused(train: Train, tmp_path: Path) -> None:
    """Going on with other data, another model or batch is a mistake, not a continuation."""
    run_dir = tmp_path / "run"
    assert train(run_dir).code == 0
    for change, named in [
        (["--model.layers", "3"], "model"),
        (["--train.global_batch_size", "8"], "train.global_batch_size"),
        (["--data.split", "70,30,0"], "data.split"),
        (["--objective.kind", "random_masking"], "objective"),
    ]:
        complaint = train(run_dir, *change).complaint()
        assert f"was written with {named}" in complaint
        assert "run_dir" in complaint
        assert (f"train.branch_from = {run_dir}" in complaint) == (named != "model")
    complaint = train(run_dir, "--train.initial_weights", str(tmp_path)).complaint()
    assert "train.initial_weights is" in complaint
    assert "remove the setting" in complaint


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"zero_optimisation": {"stage": 3}}', ["'zero_optimisation'", "'zero_optimization'"]),
        ('{"gradient_cliping": 1.0}', ["'gradient_cliping'"]),
        ('{"train_batch_size": 8}', ["'train_batch_size'", "train.global_batch_size"]),
        ('{"fp16": {"enabled": true}}', ["'fp16'", "engine.precision"]),
        ('{"comms_logger": {"enabled": true}}', ["'comms_logger'", "profiling.communication_steps"]),
        ('{"zero_optimization": ', ["not valid JSON"]),
        ('{"zero_optimization": {"stage": 0}}', ["zero_optimization.stage is 0", "1, 2 or 3", "'plain'"]),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', ["'stage' is given twice"]),
        ("[]", ["JSON object"]),
    ],
)
def test_bad_deepspeed_json(tmp_path: Path, content: str, parts: list[str]) -> None:
    """DeepSpeed itself would ignore most of these in silence."""
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_deepspeed_json(path)
    for part in [str(path), *parts]:
        assert part in str(caught.value)
