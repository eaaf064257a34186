"""The benchmarks compare what is equal, and count what is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from benchmarks import gradient_precision, ranks, sampling, step_options, train_step
from benchmarks.random_text import MASK
from benchmarks.train_step import Shape
from pipeline.model.batch import MaskedBatch, Vocabulary, masked_batch
from pipeline.model.transformer import MaskedDiffusionModel
from support.forked import start_forked
from support.programs import ROOT

pytestmark = pytest.mark.slow

SHAPE = Shape(2, 64, 4, 192, 3000, 48)


def test_rows_of_logits_are_aligned() -> None:
    """The paper's 151,645 tokens have 151,648 rows: a multiple of 8 bf16 numbers, 16 bytes."""
    assert train_step.SHAPES["paper"].tokens() == Vocabulary(151_648, 151_645, MASK)
    for config in (ROOT / "configs").glob("*.yaml"):
        assert (yaml.safe_load(config.read_text())["model"].get("vocab_size") or 0) % 8 == 0, config


def example() -> tuple[MaskedDiffusionModel, MaskedBatch]:
    """Return a model with allocated gradients, and 4 sequences of which a third is masked."""
    torch.manual_seed(0)
    model = MaskedDiffusionModel(SHAPE.model(), Vocabulary(SHAPE.vocabulary, SHAPE.vocabulary, MASK))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(4, SHAPE.vocabulary, (4, SHAPE.length))
    masked = torch.arange(SHAPE.length).expand_as(tokens) % 3 == 0
    return model, masked_batch(tokens, masked, int(masked.sum()), MASK)


def test_the_full_logit_step_computes_the_same() -> None:
    """Loss, confidences and gradients of the step that ours is compared with are ours."""
    results = []
    for full in (False, True):
        model, batch = example()
        output = model(batch)
        loss, confidence = output.loss, output.confidence
        if full:
            loss, confidence = train_step.full_logit_loss(model, batch)
            confidence = confidence[batch.rows]
        loss.backward()
        results.append([loss, confidence, *(parameter.grad for parameter in model.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("full", [False, True], ids=["ours", "full-logits"])
def test_counted_memory_is_the_allocators(full: bool) -> None:
    """Sizes added up without computing anything, against every allocation that the profiler sees."""
    counted = train_step.peak_bytes(SHAPE, 4, "none", "meta")["full_logits" if full else "ours"]
    model, batch = example()
    masked = torch.arange(SHAPE.length).expand(4, -1) % 2 == 0
    batch = masked_batch(batch.input_ids, masked, int(masked.sum()), MASK)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        (train_step.full_logit_loss(model, batch)[0] if full else model(batch).loss).backward()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    assert counted == pytest.approx(np.cumsum([event.nbytes() for event in events]).max(), rel=0.05)


@pytest.mark.distributed
def test_the_error_of_a_gradient_is_that_of_its_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in fp32 are exact to fp32's rounding, those in bf16 are not: the check can fail."""
    monkeypatch.setattr(ranks, "start_ranks", start_forked)
    path = tmp_path / "errors.json"
    arguments = ["--micro-batches", "4", "--stages", "3", "--output", str(path)]
    gradient_precision.main(arguments)
    errors = {each["sum"]: each["gradient"] for each in json.loads(path.read_text())["errors"]}
    assert len(errors) == len(gradient_precision.CHOICES)
    for name, error in errors.items():
        assert error < 1e-7 if name.startswith("fp32") else 1e-4 < error < 1e-2, name


def test_train_step_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_step.SHAPES, "small", SHAPE)
    path = tmp_path / "figures.json"
    train_step.main(["--batch-size", "4", "--repetitions", "2", "--output", str(path)])
    figures = json.loads(path.read_text())
    assert len(figures["seconds"]) == 2
    printed = capsys.readouterr().out
    for name, value in figures["ratios"].items():
        assert value > 0
        assert f"{name:32} {value:.3f}" in printed
    assert 0 < figures["masked_share"] < 1


def test_step_options_write_their_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option of a group beside the default; smaller chunks of the head hold less."""
    monkeypatch.setitem(train_step.SHAPES, "small", SHAPE)
    path = tmp_path / "figures.json"
    groups = "head checkpointing precision attention masks optimizer documents".split()
    arguments = ["--batch-size", "8", "--repetitions", "1", "--output", str(path)]
    step_options.main([*arguments, "--only", *groups])
    figures = json.loads(path.read_text())
    head, recomputed = figures["head"], figures["checkpointing"]
    assert head["chunks of 64 rows"]["peak_bytes"] < head["chunks of 192 rows (default)"]["peak_bytes"]
    assert recomputed["blocks"]["peak_bytes"] < recomputed["swiglu (default)"]["peak_bytes"]
    assert recomputed["swiglu (default)"]["peak_bytes"] < recomputed["none"]["peak_bytes"]
    assert {"all seen, sdpa math", "block mask, sdpa math"} < set(figures["attention"])
    assert "bf16 weights" in capsys.readouterr().out


def test_sampling_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way fills all tokens; the ratios are those of the medians that stand beside them."""
    path = tmp_path / "figures.json"
    small = "--layers 1 --hidden-size 32 --vocabulary 50 --prompt 4 --answer 8 --block-size 4 --repetitions 1"
    sampling.main([*small.split(), "--output", str(path)])
    figures = json.loads(path.read_text())
    rates = figures["tokens_per_second"]
    for name, value in figures["tokens_per_forward"].items():
        wanted = next((n for n in (1, 2, 4) if f"{n} a step" in name), None)
        assert value == wanted if wanted else 1 <= value <= 4
    ratio = rates["blocks, 4 a step, cache"] / rates["blocks, 4 a step, no cache"]
    assert figures["ratios"]["cache / no cache, 4 a step"] == pytest.approx(ratio)
    assert f"{ratio:.2f}" in capsys.readouterr().out
