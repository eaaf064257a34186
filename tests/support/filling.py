"""The sampler as one would write it down: one sequence, sets and loops, float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.decoding.sampling import SamplingSettings
from support.oracles import best, uniform

REVEAL_ORDER, SAMPLED_TOKEN, REMASKING = 1, 8, 9


@dataclass
class Filled:
    """A filled sequence, the step of each position (-1: none), and the number of steps."""

    tokens: np.ndarray
    order: np.ndarray
    steps: int


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def allowed(logits: np.ndarray, top_k: int | None, top_p: float | None) -> list[int]:
    """Return the tokens that top-k and then top-p leave, one after another, likeliest first."""
    falling = sorted(np.flatnonzero(logits > -np.inf), key=lambda v: -logits[v])
    kept = falling[:top_k]
    p = np.exp(logits[kept] - logits.max())
    p /= p.sum()
    count = next(n for n in range(1, len(kept) + 1) if n == len(kept) or p[:n].sum() >= (top_p or 1.0))
    return [int(v) for v in kept[:count]]


def draw(logits: np.ndarray, settings: SamplingSettings, number: int, position: int, step: int) -> int:
    """Return the likeliest token, or the one that the noise draws."""
    if settings.temperature == 0:
        return int(logits.argmax())
    scaled = logits / settings.temperature
    noisy = {}
    for v in allowed(scaled, settings.top_k, settings.top_p):
        u = uniform(settings.seed, SAMPLED_TOKEN, number, position, step, v)
        noisy[v] = scaled[v] - np.log(-np.log(u))
    return max(noisy, key=lambda v: noisy[v])


def scores(policy: str, p: dict[int, np.ndarray], seed: int, number: int) -> dict[int, float]:
    """Return what positions are ranked by."""
    if policy == "random":
        return {i: uniform(seed, REVEAL_ORDER, number, i) for i in p}
    if policy == "left_to_right":
        return {i: -i for i in p}
    if policy == "margin":
        return {i: np.sort(q)[-1] - np.sort(q)[-2] for i, q in p.items()}
    if policy == "entropy":
        return {i: (q[q > 0] * np.log(q[q > 0])).sum() for i, q in p.items()}
    return {i: np.float32(q.max()) for i, q in p.items()}  # equal ones go by position


def fill(
    tokens: np.ndarray,
    blocks: dict[int, int],
    number: int,
    settings: SamplingSettings,
    logits_of: Callable[[np.ndarray, int], np.ndarray],
    mask: int,
    stop: int | None,
) -> Filled:
    """Fill the positions of `blocks` (position: number of its block)."""
    tokens, order, masked = tokens.copy(), np.full(len(tokens), -1), set(blocks)
    step, place, before = 0, 0, None
    while True:
        ends = [i for i in blocks if i not in masked and tokens[i] == stop]
        left = [i for i in sorted(masked) if i < min(ends, default=len(tokens))]
        if not left:
            tokens[sorted(masked)] = mask
            return Filled(tokens, order, step)
        current = min(blocks[i] for i in left)
        place, before = (place + 1 if current == before else 1), current
        xt = tokens.copy()
        xt[sorted(masked)] = mask
        logits = {i: logits_of(xt, i).copy() for i in left if blocks[i] == current}
        for each in logits.values():
            each[mask] = -np.inf
        p = {i: probabilities(each) for i, each in logits.items()}

        members = [i for i in blocks if blocks[i] == current]
        filled = [i for i in members if i not in masked]
        after = min(len(members), settings.tokens_per_step * place)
        if settings.steps:
            after = len(members) * place // settings.steps
        again: list[int] = []
        count = max(1, after - len(filled))
        if settings.threshold:
            count = settings.tokens_per_step
        if settings.remasking and filled:
            highest = min(1.0, (1 - after / len(members)) / (len(filled) / len(members)))
            sigma = settings.eta * highest if settings.remasking == "rescale" else min(settings.eta, highest)
            again = [i for i in filled if uniform(settings.seed, REMASKING, number, i, step) < sigma]
        if settings.remasking:
            count = after - (len(filled) - len(again))
        chosen = set(best(sorted(p), scores(settings.policy, p, settings.seed, number), count))
        chosen |= {i for i in p if settings.threshold and p[i].max() > settings.threshold}
        for i in chosen:
            tokens[i] = draw(logits[i], settings, number, i, step)
            order[i] = step
        order[again] = -1
        masked = masked - chosen | set(again)
        step += 1
