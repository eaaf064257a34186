"""A sharded engine begins with the weights of the plain one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.forked import run_forked

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

BUILD = """
import sys
import torch
from pipeline import config as configuration
from pipeline.engine.build import build_engine
from pipeline.engine.module import make_model
from pipeline.model.batch import Vocabulary
from pipeline.ranks import join_ranks

config, vocabulary = configuration.load(sys.argv[1:]), Vocabulary(48, 48, 3)
engine = build_engine(config, join_ranks("cpu"), vocabulary)
plain = dict(make_model(config, vocabulary).named_parameters())
held = 0
weights = engine.shards.weights()
for piece in engine.shards.pieces(engine.names):
    part = slice(piece.offset, piece.offset + piece.length)
    expected = plain[piece.name].detach().flatten()[part].bfloat16().float()
    assert torch.equal(weights[piece.tensor][piece.start : piece.start + piece.length], expected), piece.name
    held += piece.length
print("equal:", held == sum(weight.numel() for weight in plain.values()))
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_in_bf16_they_are_rounded_and_nothing_else(tmp_path: Path, stage: int) -> None:
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    arguments = ["--run_dir", "x", "--data.prefixes", "[x]", "--engine.precision", "bf16"]
    arguments += ["--engine.deepspeed_config", str(settings), "--model.layers", "2"]
    arguments += ["--model.hidden_size", "16", "--model.heads", "2", "--model.intermediate_size", "32"]
    result = run_forked("-c", BUILD, *arguments)
    assert "equal: True" in result.stdout, result.stderr
