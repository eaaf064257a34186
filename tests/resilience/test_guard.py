"""Which steps the guard refuses, for given losses and gradient norms."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.config import GuardConfig
from pipeline.engine.deepspeed import DeepSpeedEngine
from pipeline.ranks import Ranks
from pipeline.resilience.guard import FEWEST, WINDOW, Guard


def seasoned(limit: float = 20.0, clip: float = 1.0) -> tuple[Guard, list[float], list[float]]:
    """Return a guard after 200 normal steps, and their losses and gradient norms."""
    random = np.random.default_rng(0)
    guard = Guard(GuardConfig(spike_limit=limit), clip)
    losses, norms = random.normal(3.0, 0.2, 200).tolist(), random.lognormal(0.0, 0.5, 200).tolist()
    assert all(guard.judge(loss, norm) for loss, norm in zip(losses, norms, strict=True))
    return guard, losses, norms


@pytest.mark.parametrize(
    ("loss", "norm", "problem"),
    [
        (math.nan, 1.0, "loss is not finite"),
        (math.inf, 1.0, "loss is not finite"),
        (3.0, math.nan, "gradient norm is not finite"),
        (3.0, math.inf, "gradient norm is not finite"),
        (3.0, -1.0, "gradient norm is not finite"),  # DeepSpeed's value for a non-finite norm
    ],
)
def test_what_is_not_finite_is_refused_at_once(loss: float, norm: float, problem: str) -> None:
    guard = Guard(GuardConfig(spike_limit=0), 1.0)
    assert guard.judge(3.0, 1.0)
    assert not guard.judge(loss, norm)
    assert problem in str(guard.problem)
    assert guard.window.in_a_row == 1
    assert guard.judge(3.0, 1.0)
    assert (guard.problem, guard.window.in_a_row) == (None, 0)


def test_limits_are_those_of_the_last_128_steps() -> None:
    """The limit is median + spike_limit x 1.4826 MAD: just below is accepted, just above is refused."""

    def highest(values: list[float], least: float) -> float:
        last = values[-WINDOW:]
        middle = statistics.median(last)
        spread = 1.4826 * statistics.median([abs(value - middle) for value in last])
        return middle + max(20 * spread, least)

    guard, losses, norms = seasoned()
    loss_limit, norm_limit = highest(losses, 1.0), highest(norms, 0.0)
    state = guard.window.to_json()
    for loss, norm, sound in [
        (loss_limit - 1e-6, 1.0, True),
        (loss_limit + 1e-6, 1.0, False),
        (3.0, norm_limit - 1e-6, True),
        (3.0, norm_limit + 1e-6, False),
    ]:
        guard.window.restore(state)  # a restored window gives the same limits
        assert guard.judge(loss, norm) is sound, (loss, norm)


def test_small_changes_near_zero_are_no_spikes() -> None:
    """A loss below 1 nat, and a norm below the clipping threshold, are never refused."""
    guard = Guard(GuardConfig(), 1.0)
    for _ in range(WINDOW):
        assert guard.judge(1e-4, 1e-3)
    assert guard.judge(0.9, 0.99)
    assert guard.judge(-1e-7, 0.99), "rounding can make a loss of 0 negative"
    assert not guard.judge(1.1, 0.99)
    assert not guard.judge(0.1, 1.01)


def test_a_spike_that_stays_becomes_the_rule() -> None:
    """After half a window a new level is accepted, so no run is refused forever."""
    guard, _, _ = seasoned()
    answers = [guard.judge(30.0, 1.0) for _ in range(WINDOW)]
    assert not any(answers[: WINDOW // 2 - 2])
    assert all(answers[WINDOW // 2 + 2 :])


def test_larger_gradients_of_a_sound_loss_become_the_rule_before_the_run_goes_back() -> None:
    """Skipping cannot lower the norms, so clipped steps are accepted; without clipping the run rolls back."""
    guard, _, _ = seasoned()
    before = GuardConfig().skips_before_rollback
    answers = [guard.judge(3.0, 70.0 + step % 7) for step in range(before + WINDOW)]
    assert answers == [False] * (before - 1) + [True] * (WINDOW + 1)
    assert not guard.judge(3.0, 2000.0), "a spike above the new level is refused"
    assert guard.judge(30.0, 70.0) is False, "and so is a loss spike"
    guard, _, _ = seasoned(clip=0)
    assert not any(guard.judge(3.0, 70.0) for _ in range(before)), "no clipping bounds those steps"


def test_no_spikes_without_a_history_or_a_limit() -> None:
    guard = Guard(GuardConfig(), 1.0)
    assert all(guard.judge(1.0, 0.5) for _ in range(FEWEST - 1))
    assert guard.judge(1e6, 1e6)
    guard, _, _ = seasoned(limit=0)
    assert guard.judge(1e6, 1e6)


def test_the_norm_of_offloaded_gradients_meets_the_losses_on_the_gpu() -> None:
    """DeepSpeed returns the norm on the CPU, but torch.cat needs one device; fake tensors here."""
    with FakeTensorMode():
        engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
        engine.ranks = Ranks(device=torch.device("cuda", 0))
        agreed = torch.zeros(2, dtype=torch.float64, device=engine.ranks.device)
        engine.accept = lambda norm: len(torch.cat([agreed, norm.double().reshape(1)])) == 3
        assert engine._accept(torch.ones(()))
