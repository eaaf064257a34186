"""Slow, plain NumPy versions of the method, written from its definition: what the tests compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

REVEAL_ORDER, STAGE_TARGET, MASK_RATIO, MASK_POSITIONS, FIRST_MASKED = 1, 2, 3, 4, 5
SKIPPED_STAGES = 10


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
    """One PUMA chain of one sequence or block, in sets and loops."""

    def __init__(
        self,
        seed: int,
        example: int,
        answer: list[int],
        stages: Callable[[int], int],
        threshold: float | None,
        policy: str = "confidence",
        number: int = 0,
        bell: tuple[float, float] | None = None,
        skipped: int = 0,
        pool: float = 0.0,
    ) -> None:
        self.seed, self.example, self.number, self.answer = seed, example, number, answer
        self.stages, self.threshold, self.policy = stages, threshold, policy
        self.bell, self.skipped, self.pool = bell, skipped, pool
        self.ended = False

    def target(self, stage: int, step: int) -> int:
        """Return the unmasked count of a stage: round(r L_eff), one masked token stays."""
        jitter = uniform(self.seed, STAGE_TARGET, self.example, self.number, stage)
        r = (stage + jitter) / self.stages(step)
        if self.bell:
            r = 1 - bell_quantile(1 - r, *self.bell)
        return min(int(np.floor(r * len(self.answer) + 0.5)), len(self.answer) - 1)

    def order(self) -> dict[int, float]:
        """Return the order of what is revealed without scores."""
        if self.policy == "left_to_right":
            return {i: -i for i in self.answer}
        return {i: uniform(self.seed, REVEAL_ORDER, self.example, i) for i in self.answer}

    def begin(self, stage: int, step: int) -> None:
        """Reveal the count of the stage."""
        self.stage = stage
        self.masked = set(self.answer) - set(best(self.answer, self.order(), self.target(stage, step)))

    def advance(self, ranking: dict[int, float], confidence: dict[int, float], step: int) -> None:
        """Reveal by ranking up to the next stage's count, then everything above the threshold."""
        if self.policy in ("random", "left_to_right"):
            ranking = self.order()
        before, after = self.stages(step), self.stages(step + 1)
        done = self.stage + 1  # parts of 1/before
        self.stage = next(j for j in range(2 * after + done) if j * before >= done * after)
        if self.skipped:
            drawn = uniform(self.seed, SKIPPED_STAGES, self.example, self.number, done - 1)
            self.stage += int(drawn * (self.skipped + 1))
        wanted = self.target(self.stage, step + 1) - (len(self.answer) - len(self.masked))
        if self.pool:
            size = max(wanted, int(np.ceil(self.pool * len(self.masked))))
            ranked = set(best(best(sorted(self.masked), ranking, size), self.order(), wanted))
        else:
            ranked = set(best(sorted(self.masked), ranking, wanted))
        self.masked -= ranked
        self.revealed = len(ranked), 0  # by rank, by threshold
        if self.threshold is not None:
            self.revealed = len(ranked), sum(confidence[i] > self.threshold for i in self.masked)
            self.masked = {i for i in self.masked if not confidence[i] > self.threshold}
            unmasked = len(self.answer) - len(self.masked)
            if self.revealed[1]:
                part = unmasked / len(self.answer)
                if self.bell:
                    part = 1 - bell_share(1 - part, *self.bell)
                self.stage = max(self.stage, int(part * after + 1e-9))
        self.ended = self.stage >= after


def bell_share(ratio: float, mean: float, std: float) -> float:
    """Return the share below `ratio` of a normal distribution that is cut off to [0, 1]."""
    normal = NormalDist(mean, std)
    return (normal.cdf(ratio) - normal.cdf(0)) / (normal.cdf(1) - normal.cdf(0))


def bell_quantile(share: float, mean: float, std: float) -> float:
    """Return the ratio below which `share` of that distribution lies."""
    normal = NormalDist(mean, std)
    between = normal.cdf(0) + share * (normal.cdf(1) - normal.cdf(0))
    if not 0 < between < 1:
        return round(between)
    return min(1.0, max(0.0, normal.inv_cdf(between)))


def random_mask(
    seed: int, example: int, answer: list[int], stage: int = 0, number: int = 0, strata: int | None = None
) -> set[int]:
    """Return n ~ U{1..L_eff} random answer positions."""
    count = 1 + int(mask_ratio(seed, example, stage, number, strata) * len(answer))
    return set(best(answer, {i: uniform(seed, MASK_POSITIONS, example, i, stage) for i in answer}, count))


def mask_ratio(seed: int, example: int, stage: int, number: int, strata: int | None) -> float:
    """Return the number in [0, 1) behind a mask, stratified over `strata` slots or not."""
    if strata is None:
        return uniform(seed, MASK_RATIO, example, number, stage)
    shared = uniform(seed, MASK_RATIO, example // strata, number, stage)
    return (shared + example % strata / strata) % 1.0


def bernoulli_mask(
    seed: int, example: int, answer: list[int], strata: int | None = None
) -> tuple[set[int], float]:
    """Return a mask of independent positions given that it is not empty, and the weight of each of them."""
    kept = mask_ratio(seed, example, 0, 0, strata)  # 1 - t
    length = len(answer)
    u = uniform(seed, FIRST_MASKED, example, 0, 0)
    chances = [kept**j * (1 - kept) / (1 - kept**length) for j in range(length)]
    first = next((j for j in range(length) if sum(chances[: j + 1]) > u), length - 1)
    masked = {answer[first]} | {
        i for i in answer[first + 1 :] if uniform(seed, MASK_POSITIONS, example, i, 0) >= kept
    }
    return masked, (1 - kept**length) / ((1 - kept) * length)


@dataclass
class HeadResult:
    """What a head gives: loss [], all else [R], gradients of hidden [R, H] and weight [V, H]."""

    loss: float
    nll: np.ndarray
    confidence: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray
    grad_hidden: np.ndarray
    grad_weight: np.ndarray


def full_logit_head(
    hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, weights: np.ndarray, forbidden: list[int]
) -> HeadResult:
    """Return loss, scores and gradients by full float64 logits."""
    logits = hidden.astype(np.float64) @ weight.astype(np.float64).T
    logits[:, forbidden] = -np.inf
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    nll = -np.log(probabilities[rows, targets])
    gradient = probabilities.copy()
    gradient[rows, targets] -= 1
    gradient *= weights[:, None]
    ordered = np.sort(probabilities, axis=1)
    allowed = np.delete(probabilities, forbidden, axis=1)
    return HeadResult(
        float((nll * weights).sum()),
        nll,
        ordered[:, -1],
        ordered[:, -1] - ordered[:, -2],
        -(allowed * np.log(allowed)).sum(axis=1),
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
