"""Sums of two numbers with fixed digits, and how far their carries run.

A carry chain begins at a position whose digits sum to 10 or more and runs through the positions above it
whose digits sum to 9. Long chains are rare among uniform draws: a model that has the common ones right may
still be wrong on most of the others.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.arrays import Array

DRAWS = 1 << 18  # pairs drawn at a time


def draw_sums(seed: int, count: int, digits: int, chains: range | None = None) -> list[tuple[str, str]]:
    """Return `count` prompts ``a+b=`` and their sums, a and b uniform; digits are zero-padded.

    Args:
        seed: the same one gives the same sums.
        count: number of sums.
        digits: of a and of b; the sum has one more.
        chains: lengths that the longest carry chain may have; others are drawn again. None = any.
    """
    rng, found = np.random.default_rng(seed), list[tuple[str, str]]()
    while len(found) < count:
        pairs = rng.integers(0, 10, (DRAWS, 2, digits))
        longest = longest_carry_chains(pairs)
        fits = np.ones(DRAWS, bool) if chains is None else np.isin(longest, chains)
        for a, b in pairs[fits][: count - len(found)]:
            a, b = ("".join(map(str, number)) for number in (a, b))
            found.append((f"{a}+{b}=", f"{int(a) + int(b):0{digits + 1}d}"))
    return found


def longest_carry_chains(pairs: Array) -> Array:
    """Return the length [N] of the longest carry chain of each pair; 0 without a carry.

    Args:
        pairs: [N, 2, digits], the highest digit first.
    """
    running = longest = np.zeros(len(pairs), int)
    for column in pairs.sum(axis=1).T[::-1]:
        carried = (column == 9) & (running > 0)
        running = np.where(column >= 10, 1, np.where(carried, running + 1, 0))
        longest = np.maximum(longest, running)
    return longest


def chain_of(prompt: str) -> int:
    """Return the length of the longest carry chain of a prompt ``a+b=``."""
    pair = [list(map(int, number)) for number in prompt.removesuffix("=").split("+")]
    return int(longest_carry_chains(np.array([pair]))[0])
