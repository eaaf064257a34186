"""Completion of prompts and masked spans by the model of a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import load_model
from pipeline.decoding.completing import complete, infill
from pipeline.decoding.sampling import SamplingSettings
from pipeline.evaluation.likelihood import score_answers


def test_completions_and_spans(run_folder: Path) -> None:
    """An answer ends with its end-of-sequence token; given text is kept; `order` holds the steps."""
    loaded = load_model(run_folder, torch.device("cpu"))
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
    with pytest.raises(UserError, match="exceeds the trained sequence length 12"):
        complete(loaded, ["abcdef"], length=7)
    with pytest.raises(UserError, match="exceeds the trained sequence length 12"):
        infill(loaded, [["abcdef", 7]])
    with pytest.raises(UserError, match="no masked span"):
        infill(loaded, [["ab", "cd"]])


def test_in_bfloat16(run_folder: Path) -> None:
    """Weights and activations are bf16, logits fp32; scores are close to those of fp32."""
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(run_folder, torch.device("cpu"), dtype=dtype)
        assert {weight.dtype for weight in loaded.model.parameters()} == {dtype}
        assert len(complete(loaded, ["abc"], length=4)[0].tokens) <= 4
        prompt, answer = (loaded.tokenizer.encode(text).tolist() for text in ("abc", "cb"))
        scores.append(score_answers(loaded, [(prompt, answer)])[0].nll)
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "best"}, "--policy is best: choose from confidence, margin,"),
        ({"tokens_per_step": 0}, "--tokens-per-step is 0: it must be 1 or more"),
        ({"steps": 3, "threshold": 0.5}, "--steps is 3: it sets what a step fills"),
        ({"threshold": 1.0}, "--threshold is 1.0: it is a probability"),
        ({"threshold": 0.5, "policy": "random"}, "--threshold is 0.5: it fills by confidence"),
        ({"temperature": -1.0}, "--temperature is -1.0: it must be 0"),
        ({"top_k": 4}, "--top-k is 4: it has no effect at temperature 0"),
        ({"top_p": 1.5, "temperature": 1.0}, "--top-p is 1.5: it is a probability"),
        ({"remasking": "loop"}, "--remasking is loop: choose from cap, rescale"),
        ({"remasking": "cap"}, "--eta is None: --remasking is cap; give both"),
        ({"eta": 0.1}, "--eta is 0.1: --remasking is None; give both"),
        ({"remasking": "cap", "eta": 2.0}, "--eta is 2.0: give a value above 0"),
        ({"remasking": "cap", "eta": 0.1, "threshold": 0.5}, "--remasking is cap: its schedule fixes"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingSettings(**settings).check()  # type: ignore[arg-type]
