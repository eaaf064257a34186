"""Sharded training equals plain training: the plain engine in one process is the oracle."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support import oracles
from support.programs import ROOT, run_program

STEPS = str(ROOT / "tests/support/steps.py")
# Where sums are taken in another order, two confidences that nearly tie may change places, and the chains
# part: with this seed none do.
SETTINGS = """
    --train.seed 2
    --model.layers 2 --model.hidden_size 32 --model.intermediate_size 64 --optimizer.learning_rate 3e-3
    --optimizer.gradient_clip 0.3 --schedule.warmup_steps 3 --train.steps 20 --train.global_batch_size 8
    --train.micro_batch_size 2 --objective.stages 4 --optimizer.ema_decay 0.5
""".split()


def train(output: Path, ranks: int, *more: str) -> dict[str, Any]:
    """Return losses, gradient norms and final weights of 20 steps."""
    result = run_program(STEPS, str(output), "20", *SETTINGS, *more, ranks=ranks)
    assert result.returncode == 0, result.stderr
    return torch.load(output, weights_only=True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, []),
        (4, []),
        # The threshold is above chance for 24 tokens: it reveals from the first step.
        (
            2,
            ["--objective.policy", "entropy", "--objective.threshold", "0.06",
             "--engine.activation_checkpointing", "none"],
        ),
        (2, ["--model.tie_embeddings", "false", "--model.kv_heads", "2", "--model.attention_bias", "true"]),
        (2, [*"--objective.block_size 3 --objective.policy margin --model.prediction shifted".split()]),
        (2, ["--objective.kind", "random_masking", "--engine.deepspeed_config", "ds_configs/cpu_debug.json"]),
        (2, ["--engine.sequence_parallel_size", "2"]),
        (
            4,
            ["--engine.sequence_parallel_size", "2", "--engine.activation_checkpointing", "blocks",
             "--model.kv_heads", "2", "--objective.block_size", "3", "--model.prediction", "shifted"],
        ),
    ],
    ids=["puma", "puma-4-ranks", "threshold", "untied-gqa-bias", "blocks", "random-masking",
         "sequence-parallel", "sequence-and-data-parallel"],
)  # fmt: skip
def test_zero3_equals_plain_training(tmp_path: Path, ranks: int, more: list[str]) -> None:
    """20 steps of ZeRO-3 on several ranks, accumulating, equal 20 steps of plain torch in one process."""
    sharded = train(tmp_path / "sharded.pt", ranks, *more)
    of_model = [
        item
        for key, value in zip(more[::2], more[1::2], strict=True)
        if not key.startswith("--engine")
        for item in (key, value)
    ]
    plain = train(tmp_path / "plain.pt", 1, "--engine.kind", "plain", *of_model)
    assert plain["losses"][0] > 3.0, "the untrained model is near the uniform distribution"
    assert_equal(sharded, plain)


def assert_equal(sharded: dict[str, Any], plain: dict[str, Any]) -> None:
    """Losses, gradient norms, final weights and their average agree; the average has its closed form."""
    assert sharded["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert sharded["norms"] == pytest.approx(plain["norms"], abs=1e-5)
    for name, weight in sharded["weights"].items():
        torch.testing.assert_close(weight, plain["weights"][name], atol=1e-5, rtol=0)
    assert set(plain["weights"]) - set(sharded["weights"]) <= {"lm_head.weight"}
    for name in plain["history"][0]:
        expected = torch.from_numpy(
            oracles.weight_average([w[name].double().numpy() for w in plain["history"]], 0.5)
        )
        for run in (sharded, plain):
            torch.testing.assert_close(run["average"][name].double(), expected, atol=1e-5, rtol=0)
    assert set(sharded["average"]) == set(plain["average"]) == set(plain["history"][0])
    torch.testing.assert_close(sharded["averaged_nll"], plain["averaged_nll"], atol=1e-4, rtol=0)
    torch.testing.assert_close(sharded["nll"], plain["nll"], atol=0, rtol=1e-4)
    torch.testing.assert_close(sharded["standard_error"], plain["standard_error"], atol=1e-4, rtol=0)


@pytest.mark.distributed
def test_zero2_equals_plain_training(tmp_path: Path) -> None:
    """Stage 2 shards the optimizer alone, at other places in the parameters; the average follows it."""
    settings = tmp_path / "zero2.json"
    settings.write_text('{"zero_optimization": {"stage": 2}}')
    sharded = train(tmp_path / "sharded.pt", 2, "--engine.deepspeed_config", str(settings))
    plain = train(tmp_path / "plain.pt", 1, "--engine.kind", "plain")
    assert_equal(sharded, plain)


@pytest.mark.distributed
def test_recomputing_and_profiling_change_nothing(tmp_path: Path) -> None:
    """Activation checkpointing, the FLOPs profile and the communication log, together under ZeRO-3."""
    began = time.monotonic()
    sharded = train(
        tmp_path / "sharded.pt", 2, "--engine.activation_checkpointing", "blocks", "--run_dir", str(tmp_path),
        "--engine.deepspeed_config", "ds_configs/cpu_debug.json",
        "--profiling.flops_step", "2", "--profiling.communication_steps", "20",
    )  # fmt: skip
    wall = time.monotonic() - began
    assert_equal(sharded, train(tmp_path / "plain.pt", 1, "--engine.kind", "plain"))

    # One micro-batch of 2 sequences of 12: 4 projections, scores and values, 3 matrices of the SwiGLU.
    report = (tmp_path / "flops_profile.txt").read_text()
    block = 2 * 12 * (4 * 32 * 32 + 2 * 12 * 32 + 3 * 32 * 64)
    macs = {
        name: float(value) * 1e3
        for name, value in re.findall(r"\((model|lm_head)\): \w+\(\s*.*?, ([0-9.]+) KMACs", report)
    }
    assert macs["model"] == pytest.approx(2 * block, abs=5), report
    rows = macs["lm_head"] / (24 * 32) / 2  # logits and the gradient of the states; addmm_ is not seen
    assert rows == pytest.approx(round(rows), abs=0.02), "logits at masked positions, and nowhere else"
    assert 2 <= round(rows) <= 16

    rows_of_table = re.findall(
        r"^ +[0-9.]+ ?\w*B +(\d+) +([0-9.]+)", (tmp_path / "communication.txt").read_text(), re.MULTILINE
    )
    assert sum(int(count) for count, _ in rows_of_table) > 20 * 8, "gathers in every block of every step"
    seconds = sum(float(milliseconds) for _, milliseconds in rows_of_table) / 1e3
    assert 0 < sharded["communication_share"] < 1
    assert seconds < seconds / sharded["communication_share"] < wall, "a share of the time of those steps"
