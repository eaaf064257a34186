"""The slots' sub-streams: every example once an epoch, whoever reads it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chains.stream import Permutation, SlotStream
from support.synthetic import Pairs


@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.integers(0, 1000))
@settings(deadline=None)
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, seed, epoch)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_permutation_mixes() -> None:
    """Neighbours are torn apart, epochs and seeds differ, and no position keeps its place too often."""
    size = 5000
    orders = [[p(i) for i in range(size)] for p in (Permutation(size, 1, 0), Permutation(size, 1, 1))]
    orders.append([Permutation(size, 2, 0)(i) for i in range(size)])
    for order in orders:
        assert sum(abs(b - a) < 10 for a, b in itertools.pairwise(order)) < 60  # expected: 18
        assert sum(i == p for i, p in enumerate(order)) < 10  # expected: 1
    assert sum(a == b for a, b in zip(orders[0], orders[1], strict=True)) < 10
    assert sum(a == b for a, b in zip(orders[0], orders[2], strict=True)) < 10


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("size", "slots"), [(37, 8), (8, 8), (5, 8), (64, 4)])
def test_every_sample_once_an_epoch(workers: int, size: int, slots: int) -> None:
    """Slots that advance at different speeds read, epoch by epoch, every example exactly once."""
    stream = SlotStream(Pairs(size), slots, seed=5, workers=workers)
    epochs = 3
    seen: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(epochs)}
    cursors = [0] * slots
    while any(s + c * slots < epochs * size for s, c in enumerate(cursors)):
        for slot in range(slots):
            for _ in range(1 + slot % 3):  # some chains are shorter than others
                position = slot + cursors[slot] * slots
                examples = stream.read([slot], [cursors[slot]])
                assert examples.ids.tolist() == [position]
                if position < epochs * size:
                    seen[position // size][int(examples.tokens[0, 0]) - 100] += 1
                cursors[slot] += 1
    stream.close()
    for counts in seen.values():
        assert counts == Counter(range(size))


def test_the_number_of_reading_threads_changes_nothing() -> None:
    streams = [SlotStream(Pairs(23), 4, seed=1, workers=workers) for workers in (0, 1, 4)]
    for step in range(20):
        slots = [step % 4, (step + 1) % 4]
        read = [stream.read(slots, [step, step + 2]) for stream in streams]
        for other in read[1:]:
            assert other.tokens.equal(read[0].tokens)
            assert other.roles.equal(read[0].roles)
    for stream in streams:
        stream.close()


def test_what_a_stream_remembers_does_not_grow() -> None:
    """Neither with the epochs, nor with the examples that are left out and were read ahead in vain."""
    stream = SlotStream(Pairs(5), slots=4, seed=1, workers=2)
    stream.exclude([2])
    cursors = [0] * 4
    for _ in range(400):
        cursors = stream.admitted(range(4), cursors)
        stream.read(range(4), cursors)
        cursors = [cursor + 1 for cursor in cursors]
    assert cursors[0] * 4 // 5 > 300
    assert len(stream._ahead) == 4
    assert stream._permutation.cache_info().currsize <= 256
    stream.close()
