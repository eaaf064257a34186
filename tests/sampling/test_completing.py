"""Prompts and masked spans through a trained model's run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import Outcome

from pipeline.cli import UserError
from pipeline.sampling import Loaded, SamplingSettings, complete, infill, load_model


@pytest.fixture
def loaded(train: Callable[..., Outcome], tmp_path: Path) -> Loaded:
    """Return the model of a short run on pairs."""
    assert train(tmp_path, "--train.steps", "4", "--schedule.warmup_steps", "1").code == 0
    return load_model(tmp_path, torch.device("cpu"))


def test_completions_and_spans(loaded: Loaded) -> None:
    """An answer ends with its end-of-sequence token; given text stays; the order names each step."""
    prompts = ["abc", "f", "deba"]
    found = complete(loaded, prompts, SamplingSettings(temperature=1.0, tokens_per_step=2), length=6)
    for completion in found:
        assert 1 <= len(completion.tokens) == len(completion.order) <= 6
        assert loaded.tokenizer.eos not in completion.tokens[:-1]
        assert max(completion.order) < completion.steps <= 3
    [filled] = infill(loaded, [["ab", 3, "cd"]])
    assert filled.text.startswith("ab")
    assert filled.text.endswith("cd")
    assert sorted(filled.order) == [0, 1, 2]
    with pytest.raises(UserError, match="sequence length that the model was trained on, 12"):
        complete(loaded, ["abcdef"], length=7)
    with pytest.raises(UserError, match="no masked token"):
        infill(loaded, [["ab", "cd"]])
