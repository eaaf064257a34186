"""Sharded training equals plain training: the plain engine in one process is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program

STEPS = str(Path(__file__).with_name("steps.py"))
SETTINGS = """
    --model.layers 2 --model.hidden_size 32 --model.intermediate_size 64 --optimizer.learning_rate 3e-3
    --optimizer.gradient_clip 0.3 --schedule.warmup_steps 3 --train.steps 20 --train.global_batch_size 8
    --train.micro_batch_size 2 --objective.stages 4
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
        (2, ["--objective.threshold", "0.06"]),  # above chance for 24 tokens: reveals from the first step
        (2, ["--model.tie_embeddings", "false", "--model.kv_heads", "2", "--model.attention_bias", "true"]),
        (2, ["--objective.kind", "random_masking", "--engine.deepspeed_config", "ds_configs/cpu_debug.json"]),
    ],
    ids=["puma", "puma-4-ranks", "threshold", "untied-gqa-bias", "random-masking"],
)
def test_zero3_equals_plain_training(tmp_path: Path, ranks: int, more: list[str]) -> None:
    """20 steps of ZeRO-3 on several ranks, accumulating, equal 20 steps of plain torch in one process."""
    sharded = train(tmp_path / "sharded.pt", ranks, *more)
    plain = train(tmp_path / "plain.pt", 1, "--engine.kind", "plain", *more)
    assert sharded["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert sharded["norms"] == pytest.approx(plain["norms"], abs=1e-5)
    assert plain["losses"][0] > 3.0, "the untrained model is near the uniform distribution"
    for name, weight in sharded["weights"].items():
        torch.testing.assert_close(weight, plain["weights"][name], atol=1e-5, rtol=0)
    assert set(plain["weights"]) - set(sharded["weights"]) <= {"lm_head.weight"}
