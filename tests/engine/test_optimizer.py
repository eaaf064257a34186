"""Which parameters decay, and the learning rate against its closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.config import ModelConfig, OptimizerConfig, ScheduleConfig
from pipeline.engine.optimizer import (
    adamw_kernel,
    adamw_settings,
    hyper_parameters,
    parameter_groups,
    set_hyper_parameters,
)
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.training.learning_rate import learning_rate


@pytest.mark.parametrize("tied", [True, False])
def test_norms_biases_and_embeddings_do_not_decay(tied: bool) -> None:
    model = MaskedDiffusionModel(ModelConfig(tie_embeddings=tied, attention_bias=True), Vocabulary(16, 16, 3))
    decayed, others = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    for parameter in decayed["params"]:
        assert names[parameter].endswith(("_proj.weight", "lm_head.weight"))
        assert parameter.ndim == 2
    for parameter in others["params"]:
        assert parameter.ndim == 1 or names[parameter] == "model.embed_tokens.weight"
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert any("lm_head" in names[p] for p in decayed["params"]) is not tied


def test_everything_decays_when_asked() -> None:
    model = MaskedDiffusionModel(ModelConfig(), Vocabulary(16, 16, 3))
    (group,) = parameter_groups(model, OptimizerConfig(decay_norms_and_embeddings=True))
    assert len(group["params"]) == len(list(model.parameters()))


def test_the_fused_kernel_makes_the_same_updates() -> None:
    """20 steps of both kernels on a CPU, which has the fused one, too."""
    assert adamw_kernel(torch.device("cpu")) == {}
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    trained = []
    for kernel in ({}, adamw_kernel(torch.device("cuda"))):
        torch.manual_seed(0)
        model = MaskedDiffusionModel(ModelConfig(layers=1, hidden_size=32), Vocabulary(16, 16, 3))
        optimizer = torch.optim.AdamW(parameter_groups(model, config), **adamw_settings(config), **kernel)
        for _ in range(20):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        trained.append(model)
    for one, other in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_the_fused_kernel_finds_its_counter_on_the_device() -> None:
    """A state that another kernel saved has it on the host; the meta device stands for the GPU."""
    weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([weight], fused=None)
    optimizer.state[weight] = {"step": torch.tensor(5.0), "exp_avg": torch.empty(3, device="meta")}
    settings = hyper_parameters(optimizer)
    set_hyper_parameters(optimizer, settings)
    assert optimizer.state[weight]["step"].device.type == "cpu"
    set_hyper_parameters(optimizer, [group | {"fused": True} for group in settings])
    assert optimizer.state[weight]["step"].device.type == "meta"


def test_cosine() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10, final_ratio=0.1)
    rates = [learning_rate(step, 110, 2.0, schedule) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2.0
    assert rates[59] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[34] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert rates[109] == pytest.approx(0.2)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_warmup_stable_decay() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=20, final_ratio=0.1)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in range(1, 101)]
    assert rates[4] == 1.0
    assert rates[9:80] == [2.0] * 71
    assert rates[89] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[99] == pytest.approx(0.2)


def test_no_warmup_and_no_decay() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=0, decay_steps=0)
    assert {learning_rate(step, 50, 3.0, schedule) for step in range(1, 51)} == {3.0}


@pytest.mark.parametrize(
    ("shape", "at_quarters"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]),
        ("1-sqrt", [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]),
    ],
)
def test_shapes_of_the_final_decay(shape: Any, at_quarters: list[float]) -> None:
    """Values that a table of sines and roots gives at each quarter, between the peak and a fifth of it."""
    schedule = ScheduleConfig("wsd", warmup_steps=10, decay_steps=20, decay_shape=shape, final_ratio=0.2)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in (80, 85, 90, 95, 100)]
    assert rates == pytest.approx([0.4 + 1.6 * share for share in at_quarters])
    assert {learning_rate(step, 100, 2.0, schedule) for step in range(10, 81)} == {2.0}


def test_inverse_square_root() -> None:
    """Twice the warm-up's length gives 1 / sqrt(2), four times its length a half."""
    schedule = ScheduleConfig("inverse_sqrt", warmup_steps=25, final_ratio=0.5)
    rates = {step: learning_rate(step, 400, 3.0, schedule) for step in (5, 24, 25, 50, 100, 400)}
    expected = {5: 0.6, 24: 2.88, 25: 3.0, 50: 3.0 / math.sqrt(2), 100: 1.5, 400: 0.75}
    assert rates == pytest.approx(expected)


def test_inverse_square_root_with_a_final_decay() -> None:
    schedule = ScheduleConfig("inverse_sqrt", warmup_steps=25, decay_steps=200, final_ratio=0.0)
    rates = {step: learning_rate(step, 400, 3.0, schedule) for step in (100, 200, 225, 300, 400)}
    expected = {100: 1.5, 200: 3 / math.sqrt(8), 225: 0.875, 300: 0.5 * 3 / math.sqrt(12), 400: 0.0}
    assert rates == pytest.approx(expected)
