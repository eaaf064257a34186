"""A training step stays on its device: no tensor of the CPU meets one of a GPU, and nothing is read back.

The meta device stands for the GPU. Its tensors have no contents, so that reading one is an error, as is
joining one with a tensor of the CPU; and matrices of bf16 are multiplied as on a GPU.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from pipeline import objectives
from pipeline.chains.statistics import ChainStatistics, Walk
from pipeline.config import Config, ModelConfig, ObjectiveConfig, TrainConfig
from pipeline.data.examples import Examples, stack_examples
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.seam import ObjectiveSchedule, Scores, model_input
from support.synthetic import MASK, Pairs

pytestmark = pytest.mark.slow

DEVICE, SLOTS, ROWS = torch.device("meta"), 4, 10
OBJECTIVES = {
    "puma": ObjectiveConfig("puma", stages=3),
    "threshold": ObjectiveConfig("puma", stages=3, threshold=0.5),
    "margin": ObjectiveConfig("puma", stages=3, policy="margin"),
    "entropy": ObjectiveConfig("puma", stages=3, policy="entropy"),
    "random order": ObjectiveConfig("puma", stages=3, policy="random"),
    "left to right": ObjectiveConfig("puma", stages=3, policy="left_to_right"),
    "K schedule": ObjectiveConfig(
        "puma", stages=3, stages_increment=2, stages_first_increase=2, stages_interval=1, stages_maximum=7
    ),
    "mixture": ObjectiveConfig("puma", stages=3, random_share=0.5),
    "blocks": ObjectiveConfig("puma", stages=3, block_size=3),
    "annealing": ObjectiveConfig("puma", stages=3, attention_annealing_steps=5),
    "random masking": ObjectiveConfig("random_masking"),
    "stratified": ObjectiveConfig("random_masking", stratified=True, mask_count="bernoulli"),
    "complementary": ObjectiveConfig("random_masking", complementary=True),
    "switch": ObjectiveConfig("autoregressive", switch_to="puma", switch_step=2),
}


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast does not know the meta device; weights of bf16 are multiplied in that type without it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prediction", ["same", "shifted"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_step_stays_on_its_device(objective: ObjectiveConfig, prediction: str, dtype: torch.dtype) -> None:
    config = Config(
        "unused",
        model=ModelConfig(
            layers=2,
            hidden_size=32,
            heads=2,
            intermediate_size=48,
            prediction=prediction,
        ),
        objective=objective,
        train=TrainConfig(global_batch_size=SLOTS, micro_batch_size=SLOTS),
    )
    with DEVICE:
        model = MaskedDiffusionModel(config.model, Vocabulary(160, 150, MASK), "none").to(dtype)
    read = stack_examples([Pairs(20)[number] for number in range(SLOTS)], range(SLOTS))
    examples = read.to(DEVICE)
    for tensor in walk(model, examples, objectives.build(config, MASK, has_padding=True)):
        assert tensor.device == DEVICE
    assert all(w.grad is not None and w.grad.dtype == dtype for w in model.parameters())


def walk(model: MaskedDiffusionModel, examples: Examples, schedule: ObjectiveSchedule) -> list[Tensor]:
    """Train three steps as `SlotGroup` does, without what it tells the host; return what they lead to."""
    numbers = torch.arange(SLOTS, device=DEVICE)
    age, start = torch.zeros_like(numbers), schedule.at(1)
    statistics = ChainStatistics(schedule.longest, DEVICE)
    state = start.begin(start.layout.chains(examples), start.first_stage(numbers, 1)[:, None], 1)
    for step in (1, 2, 3):
        now, then = schedule.at(step), schedule.at(step + 1)
        batch = model_input(now, now.layout.chains(examples), state, ROWS, step)
        output = model(batch)
        output.loss.backward()
        scores = Scores.of(output, batch.rows, state.masked)
        following, ended, reveals = now.advance(now.layout.chains(examples), state, scores, step, step + 1)
        stage = then.first_stage(numbers, step + 1) if then is not now else torch.zeros_like(numbers)
        fresh = then.begin(then.layout.chains(examples), stage[:, None], step + 1)
        walked = Walk(now.layout.chains(examples), state, age, ended, reveals)
        statistics.add(statistics.of_step(walked, batch.rows, batch.weights, output))
        state = fresh if then is not now else following.replaced(ended, fresh)
    assert output.confidence.dtype == output.nll.dtype == torch.float32
    return [state.masked, state.stage, statistics.sums, output.nll, output.confidence]


def test_the_meta_device_refuses_what_a_gpu_would_wait_for_or_refuse() -> None:
    there = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError):
        there + torch.ones(3)
    with pytest.raises(RuntimeError):
        there.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        there.nonzero()
