"""The main program as users run it: resume bit for bit, curves, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("train")]

SETTINGS = """
    --model.layers 2 --model.hidden_size 32 --model.intermediate_size 64 --train.steps 16
    --train.global_batch_size 16 --train.micro_batch_size 4 --train.log_interval 4 --schedule.warmup_steps 2
    --objective.stages 4 --data.sequence_length 12 --data.kind pairs --data.split 80,20,0
    --checkpoint.interval 4 --checkpoint.keep 9 --evaluation.interval 8 --evaluation.samples 20
""".split()


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool from the project's root."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer and 60 tokenized pairs of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(60):
            prompt = "".join(random.choice(list("abcdef"), random.integers(1, 5)))
            file.write(
                json.dumps({"prompt": prompt, "answer": prompt[::-1] + "g" * int(random.integers(0, 4))})
            )
            file.write("\n")
    keys = ["--prompt-key", "prompt", "--answer-key", "answer"]
    corpus, tokenizer = str(folder / "corpus.jsonl"), str(folder / "tokenizer")
    made = tool(
        "tools/train_tokenizer.py", "--input", corpus, *keys, "--vocab-size", "16", "--model-type", "char",
        "--output", tokenizer,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    made = tool(
        "tools/preprocess_data.py", "--input", corpus, *keys, "--tokenizer", tokenizer, "--output-prefix",
        str(folder / "pairs"), "--workers", "1", "--append-eos",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder


def train(data: Path, run_dir: Path, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    """Train on the pairs of `data`."""
    place = ["--run_dir", str(run_dir), "--data.tokenizer", str(data / "tokenizer")]
    place += ["--data.prefixes", f"[{data / 'pairs'}]"]
    return run_ranks(ranks, ["-m", "pipeline.train", *place, *SETTINGS, *more])


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the run's metrics, line by line."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of one metric."""
    return [(int(line["step"]), line[key]) for line in metrics(run_dir) if key in line]


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_bit_for_bit(data: Path, tmp_path: Path, ranks: int) -> None:
    """A run that loses everything after a checkpoint repeats the uninterrupted run exactly.

    The threshold makes chains of different lengths, so cursors differ from slot to slot.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--objective.threshold", "0.3", *(["--engine.kind", "plain"] if ranks == 1 else [])]
    for run_dir in (whole, parts):
        result = train(data, run_dir, ranks, *more)
        assert result.returncode == 0, result.stderr
    for step in (12, 16):  # as if killed between steps 8 and 12: later checkpoints never came to be
        (parts / "checkpoints" / f"step_{step:08d}").rename(tmp_path / f"lost_{step}")
    (parts / "metrics.jsonl").open("a").write('{"step": 17, "lo')  # half a line of the killed process
    result = train(data, parts, ranks, *more)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert "step 8" in result.stdout
    for key in ("loss", "gradient_norm", "learning_rate", "masked_fraction", "mean_stage", "held_out/loss"):
        assert curve(parts, key) == curve(whole, key), key
    assert [step for step, _ in curve(parts, "loss")] == list(range(1, 17))
    slots = [np.load(run / "checkpoints/step_00000016/slots_00000.npz") for run in (whole, parts)]
    assert len(set(slots[0]["cursors"].tolist())) > 1, "chains of equal length would prove little"
    for key in slots[0].files:
        np.testing.assert_array_equal(slots[0][key], slots[1][key])


def test_tensorboard_has_the_curves_once(data: Path, tmp_path: Path) -> None:
    """TensorBoard's own reader finds every curve, and after a resume no step twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    assert train(data, run_dir, 1, "--engine.kind", "plain").returncode == 0
    (run_dir / "checkpoints/step_00000016").rename(tmp_path / "lost")
    assert train(data, run_dir, 1, "--engine.kind", "plain").returncode == 0
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    names = "loss learning_rate gradient_norm tokens_per_second samples_per_second masked_fraction mean_stage"
    for name in [f"train/{name}" for name in names.split()] + ["held_out/loss"]:
        assert name in events.Tags()["scalars"], name
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 17))
    from_events = [event.value for event in events.Scalars("train/loss")]
    assert from_events == pytest.approx([value for _, value in curve(run_dir, "loss")])


def test_plain_lines_without_a_terminal(data: Path, tmp_path: Path) -> None:
    """A log file gets lines with rate and time left, and no control characters."""
    result = train(data, tmp_path / "run", 1, "--engine.kind", "plain")
    assert result.returncode == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("step 8/16")]
    assert len(lines) == 1
    assert "step/s" in lines[0]
    assert "left" in lines[0]
    assert "\r" not in result.stdout + result.stderr
    assert "\x1b" not in result.stdout + result.stderr


def test_held_out_loss_does_not_depend_on_ranks(data: Path, tmp_path: Path) -> None:
    """The same model on the same masks: 1 and 2 ranks, 12 samples that do not divide by the batches."""
    values = []
    for ranks in (1, 2):
        run_dir = tmp_path / f"ranks_{ranks}"
        assert train(data, run_dir, ranks, "--evaluation.samples", "11").returncode == 0
        values.append([value for _, value in curve(run_dir, "held_out/loss")])
    assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--data.tokenizer", "nowhere"], ["nowhere", "train_tokenizer"]),
        (["--data.prefixes", "[nowhere]"], ["nowhere"]),
        (["--data.kind", "packed"], ["holds pairs", "data.kind", "'pairs'"]),
        (["--data.sequence_length", "5"], ["data.sequence_length = 5", "document", "raise"]),
        (["--model.vocab_size", "4"], ["model.vocab_size is 4", "tokens"]),
        (["--train.micro_batch_size", "5"], ["train.global_batch_size = 16", "multiple of 5"]),
        (["--data.split", "100,0,0"], ["data.split", "evaluation.interval"]),
        (["--engine.device", "cuda"], ["engine.device", "'cpu'"]),
        (["--engine.deepspeed_config", "nowhere.json", "--engine.kind", "deepspeed"], ["nowhere.json"]),
        (["--train.stepz", "3"], ["'train.stepz'", "'train.steps'"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    data: Path, tmp_path: Path, more: list[str], parts: list[str]
) -> None:
    result = train(data, tmp_path / "run", 1, "--engine.kind", "plain", *more)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def test_another_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    """Data of one tokenizer and a model of another never meet."""
    keys = ["--prompt-key", "prompt", "--answer-key", "prompt"]  # no 'g': another vocabulary
    made = tool(
        "tools/train_tokenizer.py", "--input", str(data / "corpus.jsonl"), *keys, "--vocab-size", "16",
        "--model-type", "char", "--output", str(tmp_path / "tokenizer"),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    result = train(
        data, tmp_path / "run", 1, "--engine.kind", "plain", "--data.tokenizer", str(tmp_path / "tokenizer")
    )
    assert result.returncode == 2
    assert "another tokenizer" in result.stderr


def test_a_resume_that_changes_the_run_is_refused(data: Path, tmp_path: Path) -> None:
    """Going on with other data, another model or batch is a mistake, not a continuation."""
    run_dir = tmp_path / "run"
    assert train(data, run_dir, 1, "--engine.kind", "plain").returncode == 0
    for change, named in [
        (["--model.layers", "3"], "model"),
        (["--train.global_batch_size", "8"], "train.global_batch_size"),
        (["--data.split", "70,30,0"], "the data"),
        (["--objective.kind", "random_masking"], "objective"),
    ]:
        result = train(data, run_dir, 1, "--engine.kind", "plain", *change)
        assert result.returncode == 2
        assert f"was written with {named}" in result.stderr
        assert "run_dir" in result.stderr
