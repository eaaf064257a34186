"""Counter-based noise: every random number is a hash of its purpose and counters, without generator state.

A number depends only on (seed, purpose, example, stage, position), not on the rank that holds the example,
the order of the calls, the device, or the step at which a run was resumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

REVEAL_ORDER = 1
STAGE_TARGET = 2
MASK_RATIO = 3
MASK_POSITIONS = 4
FIRST_MASKED = 5
ANNEALED_ATTENTION = 6
MIXTURE = 7
SAMPLED_TOKEN = 8
REMASKING = 9
SKIPPED_STAGES = 10

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Return the 64 bits of `value` as a signed integer; torch has no unsigned arithmetic."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts arithmetically: clear the sign bits


def _mix(x: Tensor) -> Tensor:
    """Apply splitmix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators)."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def uniform(seed: int, purpose: int, *counters: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1), one per element of the broadcast int64 `counters`.

    The same arguments give the same bits on every device.
    """
    state = torch.zeros((), dtype=torch.int64, device=counters[0].device)
    everything: tuple[int | Tensor, ...] = (seed, purpose, *counters)
    for counter in everything:
        state = _mix((state ^ counter) + _signed(_GOLDEN))
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53
