"""Slow, plain NumPy versions of the method, written from its definition: what the tests compare with."""

from __future__ import annotations

import numpy as np

INITIAL_REVEAL, STAGE_TARGET, MASK_COUNT, MASK_POSITIONS = 1, 2, 3, 4


def splitmix64(x: int) -> int:
    """Return the finaliser of splitmix64, in Python's own integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def uniform(*counters: int) -> float:
    """Return the number in [0, 1) that belongs to (seed, purpose, ...)."""
    state = 0
    for counter in counters:
        state = splitmix64(((state ^ (counter % 2**64)) + 0x9E3779B97F4A7C15) % 2**64)
    return (state >> 11) / 2**53


def best(candidates: list[int], scores: dict[int, float], count: int) -> list[int]:
    """Return the `count` candidates of the highest scores, the lower position first among equals."""
    return sorted(candidates, key=lambda i: (-scores[i], i))[: max(0, count)]


class Chain:
    """One PUMA chain of one sequence, in sets and loops."""

    def __init__(
        self, seed: int, sample: int, answer: list[int], stages: int, threshold: float | None
    ) -> None:
        self.seed, self.sample, self.answer = seed, sample, answer
        self.stages, self.threshold = stages, threshold
        self.ended = False

    def target(self, stage: int) -> int:
        """Return the unmasked count of a stage: round(r L_eff), one masked token stays."""
        r = (stage + uniform(self.seed, STAGE_TARGET, self.sample, stage)) / self.stages
        return min(int(np.floor(r * len(self.answer) + 0.5)), len(self.answer) - 1)

    def begin(self, stage: int) -> None:
        """Reveal the count of the stage at random positions."""
        noise = {i: uniform(self.seed, INITIAL_REVEAL, self.sample, i) for i in self.answer}
        self.stage = stage
        self.masked = set(self.answer) - set(best(self.answer, noise, self.target(stage)))

    def advance(self, confidence: dict[int, float]) -> None:
        """Reveal by confidence up to the next stage's count, then everything above the threshold."""
        self.stage += 1
        wanted = self.target(self.stage) - (len(self.answer) - len(self.masked))
        self.masked -= set(best(sorted(self.masked), confidence, wanted))
        if self.threshold is not None:
            self.masked = {i for i in self.masked if not confidence[i] > self.threshold}
            unmasked = len(self.answer) - len(self.masked)
            self.stage = max(self.stage, unmasked * self.stages // len(self.answer))
        self.ended = self.stage >= self.stages


def random_mask(seed: int, sample: int, answer: list[int]) -> set[int]:
    """Return n ~ U{1..L_eff} random answer positions."""
    count = 1 + int(uniform(seed, MASK_COUNT, sample) * len(answer))
    return set(best(answer, {i: uniform(seed, MASK_POSITIONS, sample, i) for i in answer}, count))


def full_logit_loss(
    hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, weights: np.ndarray, forbidden: list[int]
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return loss, NLL, confidence and the gradients of hidden and weight, by full float64 logits."""
    logits = hidden.astype(np.float64) @ weight.astype(np.float64).T
    logits[:, forbidden] = -np.inf
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    nll = -np.log(probabilities[rows, targets])
    gradient = probabilities.copy()
    gradient[rows, targets] -= 1
    gradient *= weights[:, None]
    return (
        float((nll * weights).sum()),
        nll,
        probabilities.max(axis=1, initial=0),
        gradient @ weight,
        gradient.T @ hidden,
    )


def weight_average(weights: list[np.ndarray], decay: float) -> np.ndarray:
    """Return the moving average of w_0, w_1, ... in closed form: each w_n times its share of the whole."""
    shares = np.ones(len(weights))
    for n in range(1, len(weights)):
        d = min(decay, n / (9 + n))
        shares[:n] *= d
        shares[n] = 1 - d
    return sum(share * weight for share, weight in zip(shares, weights, strict=True))
