"""Compiled blocks equal eager ones, and are compiled a few times, not at every step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.base.errors import UserError
from pipeline.chains import slots
from pipeline.config import Config, EngineConfig, ModelConfig, ObjectiveConfig
from pipeline.engine.module import compile_parts, make_model
from pipeline.model.batch import MaskedBatch, Visibility, Vocabulary, masked_batch
from pipeline.model.transformer import MaskedDiffusionModel
from support import walks

pytestmark = pytest.mark.slow

VOCABULARY = Vocabulary(48, 48, 3)
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on a CPU"
)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Reset the compiler's cache."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def configuration(**compiled: bool) -> Config:
    """Return the settings of a small model that recomputes SwiGLU."""
    model = ModelConfig(layers=3, hidden_size=32, heads=4, kv_heads=2, intermediate_size=48)
    engine = EngineConfig(kind="plain", **compiled)
    return Config("unused", model=model, engine=engine)


def models(setting: str) -> tuple[MaskedDiffusionModel, MaskedDiffusionModel]:
    """Return an eager and a compiled model with the same weights."""
    made = []
    for compiled in (False, True):
        config = configuration(**{setting: compiled})
        made.append(make_model(config, VOCABULARY))
        compile_parts(config, made[-1], CPU)
    return made[0], made[1]


def batch_of(sequences: int, length: int, in_blocks: bool) -> MaskedBatch:
    """Return random half-masked sequences, optionally in blocks of 4 with clean copies."""
    generator = torch.Generator().manual_seed(sequences)
    tokens = torch.randint(4, 48, (sequences, length), generator=generator)
    masked = torch.rand(sequences, length, generator=generator) < 0.5
    batch = masked_batch(tokens, masked, int(masked.sum()), 3)
    if not in_blocks:
        return batch
    return batch._replace(visibility=Visibility(torch.arange(length)[None] // 4, tokens))


def results(model: MaskedDiffusionModel, batch: MaskedBatch) -> list[torch.Tensor]:
    """Return loss, confidences and gradients."""
    model.zero_grad()
    output = model(batch)
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [output.loss.detach(), output.confidence, *(gradient.clone() for gradient in gradients)]


@needs_compiler
def test_compiled_blocks_compute_the_same() -> None:
    """Loss, confidences and gradients are equal at several sizes and masks, with three compilations."""
    plain, compiled = models("compile")
    assert list(compiled.state_dict()) == list(plain.state_dict()), "checkpoints know the same names"

    def compare(sequences: int, length: int, in_blocks: bool = False) -> None:
        batch = batch_of(sequences, length, in_blocks)
        for expected, got in zip(results(plain, batch), results(compiled, batch), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    compare(4, 16)
    assert counters["stats"]["unique_graphs"] == 1, "three blocks share their program"
    for sequences, length in ((2, 24), (3, 12), (5, 20)):
        compare(sequences, length)
    assert counters["stats"]["unique_graphs"] == 2, "the second shape brings a program for all others"
    compare(2, 24, in_blocks=True)
    assert counters["stats"]["unique_graphs"] == 3, "a dense mask brings another"
    plain.model.recompute = compiled.model.recompute = True
    compare(4, 16)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@needs_compiler
def test_compiled_functions_compute_the_same() -> None:
    """They hold no weights, so hooks of ZeRO-3 lie outside; no shape takes a program for each block."""
    plain, compiled = models("compile_functions")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for sequences, length, in_blocks in ((4, 16, False), (2, 24, False), (3, 12, True), (5, 20, False)):
        batch = batch_of(sequences, length, in_blocks)
        for expected, got in zip(results(plain, batch), results(compiled, batch), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] <= 2 * 3, "queries, keys and products, of one shape and of any"
    assert not counters["graph_break"]


# "aot_eager" takes an objective through the compiler's front end. The objective with the most operations goes
# through all of the compiler.
OBJECTIVES = {
    "threshold in blocks": (ObjectiveConfig(stages=5, threshold=0.7, block_size=2), "inductor"),
    "mixture under a K schedule": (
        ObjectiveConfig(
            stages=3, stages_increment=2, stages_first_increase=4, stages_interval=2, stages_maximum=31,
            policy="entropy", random_share=0.5,
        ),
        "aot_eager",
    ),
    "switch": (
        ObjectiveConfig("random_masking", stratified=True, switch_to="puma", switch_step=6, stages=4),
        "aot_eager",
    ),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("objective", "backend"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_compiled_chains_are_the_same(
    monkeypatch: pytest.MonkeyPatch, objective: ObjectiveConfig, backend: str
) -> None:
    """Masks, stages, ages and statistics of 30 steps, in one piece; numbers of rows and steps change."""
    program = torch.compile(slots.moved, fullgraph=True, backend=backend)
    monkeypatch.setattr(slots, "_compiled_move", lambda: program)
    eager, compiled = (walks.group_of(range(6), 6, objective, compiled=way) for way in (False, True))
    for number in range(1, 31):
        for group in (eager, compiled):
            walks.step(group, number)
        assert compiled.state.masked.equal(eager.state.masked)
        assert compiled.state.stage.equal(eager.state.stage)
        assert compiled.age.equal(eager.age)
        assert compiled.examples.ids.equal(eager.examples.ids)
    torch.testing.assert_close(compiled.statistics.take(), eager.statistics.take(), rtol=1e-12, atol=0)
    assert counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize("setting", ["compile", "compile_functions"])
def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = configuration(**{setting: True})
    model = MaskedDiffusionModel(config.model, VOCABULARY)
    with pytest.raises(
        UserError, match=rf"engine\.{setting} is true, but there is no no-such-compiler"
    ) as error:
        compile_parts(config, model, CPU)
    assert "\n" not in str(error.value)
