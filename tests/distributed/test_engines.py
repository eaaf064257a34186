"""Sharded training equals plain training: the plain engine in one process is the oracle.

The sharded run reveals by the oracle's scores, and its own are compared with them at every step
(support/steps.py): masks, losses and weights are then equal on every machine, whatever scores nearly tie.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from support import oracles
from support.forked import run_forked
from support.programs import ROOT

STEPS = str(ROOT / "tests/support/steps.py")
SETTINGS = """
    --model.layers 2 --model.hidden_size 32 --model.intermediate_size 64 --optimizer.learning_rate 3e-3
    --optimizer.gradient_clip 0.3 --schedule.warmup_steps 3 --train.steps 20 --train.global_batch_size 8
    --train.micro_batch_size 2 --objective.stages 4 --optimizer.ema_decay 0.5
""".split()
RAMP = [
    "--train.batch_ramp",
    "[{first_step: 6, global_batch_size: 12}, {first_step: 13, global_batch_size: 32}]",
    "--schedule.batch_scaling",
    "sqrt",
]
MUON = ["--optimizer.kind", "muon", "--optimizer.muon_learning_rate", "6e-3"]


def train(output: Path, leader: Path | str, ranks: int, *more: str) -> dict[str, Any]:
    """Return what 20 steps of steps.py write."""
    result = run_forked(STEPS, str(output), "20", str(leader), *SETTINGS, *more, ranks=ranks)
    assert result.returncode == 0, result.stderr
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains by the plain engine, once with each settings, and returns the output."""

    @cache
    def train_plain(*more: str) -> Path:
        output = tmp_path_factory.mktemp("plain") / "plain.pt"
        train(output, "-", 1, "--engine.kind", "plain", *more)
        return output

    return train_plain


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
        (2, ["--engine.compile", "true"]),
        (2, RAMP),
        (4, ["--engine.sequence_parallel_size", "2", *RAMP]),
        (3, [*MUON, "--model.tie_embeddings", "false", "--train.global_batch_size", "6"]),
        (2, ["--engine.sequence_parallel_size", "2"]),
        (
            4,
            ["--engine.sequence_parallel_size", "2", "--engine.activation_checkpointing", "blocks",
             "--model.kv_heads", "2", "--objective.block_size", "3", "--model.prediction", "shifted"],
        ),
        (
            2,
            ["--engine.sequence_parallel_size", "2", "--data.isolate_documents", "true",
             "--objective.block_size", "3", "--model.prediction", "shifted"],
        ),
    ],
    ids=["puma", "puma-4-ranks", "threshold", "untied-gqa-bias", "blocks", "random-masking",
         "compiled", "ramp", "ramp-sequence-parallel", "muon-3-ranks", "sequence-parallel",
         "sequence-and-data-parallel", "documents-sequence-parallel"],
)  # fmt: skip
def test_zero3_equals_plain_training(
    tmp_path: Path, plain: Callable[..., Path], ranks: int, more: list[str]
) -> None:
    """20 steps of ZeRO-3 on several ranks, accumulating, equal 20 steps of plain torch in one process."""
    pairs = zip(more[::2], more[1::2], strict=True)
    of_model = [item for pair in pairs if not pair[0].startswith("--engine") for item in pair]
    leader = plain(*of_model)
    assert_equal(train(tmp_path / "sharded.pt", leader, ranks, *more), leader)


def assert_equal(sharded: dict[str, Any], leader: Path) -> None:
    """Chains, losses, gradient norms, weights and their average agree; the average has its closed form."""
    plain = torch.load(leader, weights_only=True)
    assert plain["losses"][0] > 3.0, "the untrained model is near the uniform distribution"
    assert_same_chains(sharded, plain["notes"][0])
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


def assert_same_chains(sharded: dict[str, Any], plain: dict[str, torch.Tensor]) -> None:
    """Each slot is where it belongs and shows the oracle's masks, and the engine's scores are the oracle's.

    Two scores may change places where they are closer than twice the tolerance here, and nowhere else.
    """
    assert (plain["masked"].nansum(dim=(1, 2)) > 0).all(), "every step has something to predict"
    holders = sum((~notes["masked"].isnan()).long() for notes in sharded["notes"])
    held_by_plain = (~plain["masked"].isnan()).long()  # all slots, or those of the batch so far
    assert (holders == sharded["sequence_size"] * held_by_plain).all(), (
        "a slot is on one rank, or on those that share it"
    )
    for notes in sharded["notes"]:
        assert notes.keys() == plain.keys()
        held = ~notes["masked"].isnan()
        assert notes["masked"][held].equal(plain["masked"][held])
        for name, scores in notes.items():
            torch.testing.assert_close(scores[held], plain[name][held], atol=1e-6, rtol=1e-5)


@pytest.mark.distributed
def test_zero2_equals_plain_training(tmp_path: Path, plain: Callable[..., Path]) -> None:
    """Stage 2 shards the optimizer alone, at other places in the parameters; the average follows it."""
    settings = tmp_path / "zero2.json"
    settings.write_text('{"zero_optimization": {"stage": 2}}')
    assert_equal(
        train(tmp_path / "sharded.pt", plain(), 2, "--engine.deepspeed_config", str(settings)), plain()
    )


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "micro_batch"), [(1, 4), (2, 1)])
def test_muon_equals_torch_muon(
    tmp_path: Path, plain: Callable[..., Path], stage: int, micro_batch: int
) -> None:
    """ZeRO cuts through matrices. Micro-batches do not change the update: the oracle's have 2 examples."""
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    sharded = train(
        tmp_path / "sharded.pt", plain(*MUON), 2, *MUON, "--engine.deepspeed_config", str(settings),
        "--engine.precision", "fp32", "--train.micro_batch_size", str(micro_batch),
    )  # fmt: skip
    oracle = torch.load(plain(*MUON), weights_only=True)
    assert sharded["losses"] == pytest.approx(oracle["losses"], abs=1e-5)
    assert sharded["norms"] == pytest.approx(oracle["norms"], abs=1e-5)
    for name, weight in sharded["weights"].items():
        torch.testing.assert_close(weight, oracle["weights"][name], atol=1e-5, rtol=0)


@pytest.mark.distributed
def test_recomputing_and_profiling_change_nothing(tmp_path: Path, plain: Callable[..., Path]) -> None:
    """Activation checkpointing, the FLOPs profile and the communication log, together under ZeRO-3."""
    leader, began = plain(), time.monotonic()
    sharded = train(
        tmp_path / "sharded.pt", leader, 2, "--engine.activation_checkpointing", "blocks",
        "--engine.deepspeed_config", "ds_configs/cpu_debug.json", "--run_dir", str(tmp_path),
        "--profiling.flops_step", "2", "--profiling.communication_steps", "20",
    )  # fmt: skip
    wall = time.monotonic() - began
    assert_equal(sharded, leader)

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
    assert sum(int(count) for count, _ in rows_of_table) > 20 * 4, "gathers of every block in every step"
    seconds = sum(float(milliseconds) for _, milliseconds in rows_of_table) / 1e3
    assert 0 < sharded["communication_share"] < 1
    assert seconds < seconds / sharded["communication_share"] < wall, "a share of the time of those steps"
