"""Frequencies of drawn tokens against closed-form probabilities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data.examples import ANSWER, Examples
from pipeline.decoding.decoding import decode
from pipeline.decoding.drawing import draw_tokens, gumbel
from pipeline.decoding.sampling import SamplingSettings
from pipeline.model.batch import Vocabulary
from pipeline.model.masked_head import MaskedHead
from pipeline.objectives import noise
from support.filling import allowed, probabilities
from support.joints import FIRST, MASK, ExactModel, Joint

LOGITS = np.array([0.3, -1.0, 2.0, 1.2, 0.9, -0.5, 1.9, -4.0])
FORBIDDEN = 1  # the mask token


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return the deviation of `counts` from `expected`, in standard deviations of the chi-square statistic.

    Bins with fewer than 5 expected counts are merged.
    """
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def drawn(settings: SamplingSettings, count: int) -> np.ndarray:
    """Return how often each token is drawn, in rows with different counters."""
    size = len(LOGITS)
    head = MaskedHead(nn.Parameter(torch.eye(size)), Vocabulary(size, size, FORBIDDEN))
    hidden = torch.tensor(LOGITS, dtype=torch.float32).expand(count, -1)
    number = torch.arange(count)
    tokens = draw_tokens(head, hidden, settings, (number // 50, number % 10, number % 50 // 10))
    return np.bincount(tokens.numpy(), minlength=size)


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=0.5, seed=1),
        SamplingSettings(temperature=2.0, seed=2),
        SamplingSettings(temperature=1.0, top_k=3),
        SamplingSettings(temperature=0.8, top_p=0.6),
        SamplingSettings(temperature=1.0, top_p=1e-9),
        SamplingSettings(temperature=1.5, top_k=5, top_p=0.9),
    ],
    ids=["1", "0.5", "2", "top 3", "0.8 top 0.6", "top 0", "1.5 top 5 top 0.9"],
)
def test_tokens_are_drawn_from_the_softmax(settings: SamplingSettings) -> None:
    """20,000 draws match the softmax, and do not match another temperature."""
    count, logits = 20_000, LOGITS.copy()
    logits[FORBIDDEN] = -np.inf
    scaled = logits / settings.temperature
    kept = allowed(scaled, settings.top_k, settings.top_p)
    expected = np.zeros(len(logits))
    expected[kept] = count * probabilities(scaled[kept])
    found = drawn(settings, count)
    assert found[expected == 0].sum() == 0
    if len(kept) == 1:
        assert found[kept[0]] == count
        return
    assert chi_square(found[kept], expected[kept]) < 5
    other = count * probabilities(logits[kept] / (settings.temperature * 2))
    assert chi_square(found[kept], other) > 10


def test_the_likeliest_token_at_temperature_zero() -> None:
    for temperature in (0.0, 1e-3, 1e-320):
        assert drawn(SamplingSettings(temperature=temperature), 100)[LOGITS.argmax()] == 100


def test_the_noise_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest uniform number, 1 - 2^-53, gives noise of 53 log 2; float32 ends at 24 log 2."""
    largest = torch.tensor([[1 - 2.0**-53, 0.5]], dtype=torch.float64)
    monkeypatch.setattr(noise, "uniform", lambda *counters: largest)
    found = gumbel(0, [torch.zeros(1, dtype=torch.int64)], 2)
    np.testing.assert_allclose(found, [[53 * np.log(2), -np.log(np.log(2))]], rtol=1e-12)


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "random", "left_to_right"])
def test_an_exact_model_is_sampled_from_exactly(policy: str) -> None:
    """One token per step at temperature 1: sequences follow the joint distribution, with any policy."""
    joint, count = Joint(3, 4), 6_000
    tokens = torch.full((count, 4), MASK)
    examples = Examples(tokens, torch.full_like(tokens, ANSWER), torch.arange(count))
    settings = SamplingSettings(policy, temperature=1.0)  # type: ignore[arg-type]
    result = decode(ExactModel(joint), examples, examples.answer, settings)  # type: ignore[arg-type]
    places = (result.tokens - FIRST).numpy() @ 3 ** np.arange(3, -1, -1)
    found = np.bincount(places, minlength=81)
    expected = [joint.probability(np.array(x), range(4)) for x in itertools.product((1, 2, 3), repeat=4)]
    assert chi_square(found, count * np.array(expected)) < 5
