"""Slots: chains from begin to end to the next example, independent of how slots are grouped, resumable."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.base.errors import Failure
from pipeline.chains.groups import SlotGroups, slots_of_rank
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import Config, ObjectiveConfig, TrainConfig
from pipeline.objectives import build
from pipeline.ranks import Ranks
from support import oracles
from support.synthetic import Pairs
from support.walks import MASK, SEED, SIZE, group_of, output, step

PUMA = ObjectiveConfig(stages=4, threshold=0.6)
RANDOM = ObjectiveConfig(kind="random_masking")


def make(slots: list[int], total: int, config: ObjectiveConfig) -> SlotGroup:
    """Return a group whose examples another thread reads ahead."""
    return group_of(slots, total, config, workers=1)


@pytest.mark.parametrize(("first_step", "interval"), [(1, 1), (2, 3)], ids=["every-step", "in-turns"])
@pytest.mark.parametrize("threshold", [None, 0.7])
def test_chains_follow_the_oracle_over_many_samples(
    threshold: float | None, first_step: int, interval: int
) -> None:
    """Each slot walks oracle chains, the next of its own sub-stream when one has ended, at stage 0.

    A group that takes turns counts its own steps, with K as it is at each of them.
    """
    total = 6
    growth = {"stages_increment": 1, "stages_first_increase": 20, "stages_interval": 40}
    config = ObjectiveConfig(stages=5, threshold=threshold, **growth)  # type: ignore[arg-type]
    group = group_of(list(range(total)), total, config, workers=1, first_step=first_step, interval=interval)

    def step_of(turn: int) -> int:
        return first_step + (turn - 1) * interval

    def stages(turn: int) -> int:
        return 5 if step_of(turn) < 20 else 6 + (step_of(turn) - 20) // 40

    stream, data = SlotStream(Pairs(SIZE), total, SEED, workers=0), Pairs(SIZE)
    cursors = [0] * total
    chains: list[oracles.Chain | None] = [None] * total
    for number in range(1, 61):
        expected = set()
        for slot in range(total):
            position = slot + cursors[slot] * total
            example = data[stream.index(position)]
            if chains[slot] is None:
                answer = np.flatnonzero(example["roles"] == 2).tolist()
                chains[slot] = oracles.Chain(SEED, position, answer, stages, threshold)
                chains[slot].begin(slot % 5 if cursors[slot] == 0 else 0, number)
            np.testing.assert_array_equal(group.examples.tokens[slot], example["tokens"])
            expected |= {slot * 8 + i for i in chains[slot].masked}
        batch = group.inputs(step_of(number))
        assert set(batch.rows.tolist()) == expected
        tokens, inputs = group.examples.tokens.flatten(), batch.input_ids.flatten()
        assert (inputs[batch.rows] == MASK).all()
        revealed = torch.ones(tokens.shape, dtype=torch.bool)
        revealed[batch.rows] = False
        assert inputs[revealed].equal(tokens[revealed]), "what is revealed is the truth"
        assert batch.targets.equal(tokens[batch.rows])
        assert batch.attention_mask is not None
        assert batch.attention_mask.equal(group.examples.roles != 0)
        scores = output(group, batch)
        values = dict(zip(batch.rows.tolist(), scores.confidence.tolist(), strict=True))
        group.advance(batch, scores, step_of(number))
        for slot, chain in enumerate(chains):
            everywhere = {i: values.get(slot * 8 + i, 0.0) for i in chain.answer}
            chain.advance(everywhere, everywhere, number)
            if chain.ended:
                chains[slot] = None
                cursors[slot] += 1
    assert min(cursors) > 5


@pytest.mark.parametrize("config", [PUMA, RANDOM], ids=["puma", "random"])
def test_grouping_changes_no_chain(config: ObjectiveConfig) -> None:
    """8 slots on 1, 2 or 4 ranks with any accumulation: the same inputs in every slot at every step."""
    layouts = [(1, 1, 8), (1, 4, 2), (2, 1, 4), (2, 2, 2), (4, 2, 1)]
    histories = []
    for world_size, accumulation, micro_batch in layouts:
        history = {}
        for rank in range(world_size):
            for slots in slots_of_rank(rank, accumulation, micro_batch):
                group = make(slots, 8, config)
                inputs = torch.stack([step(group, i).input_ids for i in range(1, 26)])
                history.update({slot: inputs[:, row] for row, slot in enumerate(slots)})
        assert sorted(history) == list(range(8))
        histories.append(history)
    for other in histories[1:]:
        assert all(other[slot].equal(histories[0][slot]) for slot in range(8))


def test_turns_share_out_the_samples() -> None:
    """Three turns of 4 slots: no sequence in consecutive steps, and every example once an epoch."""
    train = TrainConfig(global_batch_size=4, micro_batch_size=4, seed=SEED)
    config = Config("unused", objective=replace(PUMA, turns=3), train=train)
    stream = SlotStream(Pairs(SIZE), config.slots, SEED, workers=0)
    turns = SlotGroups(config, Ranks(), stream, build(config, MASK, True)).turns
    slots = [group.slots.tolist() for groups in turns for group in groups]
    assert slots == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    visits: dict[int, list[int]] = defaultdict(list)
    for number in range(1, 91):
        group = turns[(number - 1) % 3][0]
        for position in group.examples.ids.tolist():
            visits[position].append(number)
        step(group, number)
    assert all(set(np.diff(steps)) <= {3} for steps in visits.values())
    assert max(len(steps) for steps in visits.values()) > 1
    assert set(range(2 * SIZE)) <= set(visits), "two epochs, each example at a stream position of its own"


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_turns_begin_after_a_branch(turns: int) -> None:
    """Each turn begins at its first step from the given one on, counted by hand."""
    train = TrainConfig(global_batch_size=4, micro_batch_size=2, seed=SEED)
    config = Config("unused", objective=replace(PUMA, turns=turns), train=train)
    stream = SlotStream(Pairs(SIZE), config.slots, SEED, workers=0)
    for begin in range(1, 12):
        found = SlotGroups(config, Ranks(), stream, build(config, MASK, True), begin).turns
        for turn, groups in enumerate(found):
            first = next(number for number in range(begin, 99) if (number - 1) % turns == turn)
            assert [(group.first_step, group.interval) for group in groups] == [(first, turns)] * 2


def test_random_masking_uses_every_sample_once_an_epoch() -> None:
    group = make(list(range(8)), 8, RANDOM)
    seen: Counter[int] = Counter()
    for number in range(1, 3 * SIZE + 1):
        seen.update((step(group, number).input_ids[:, 0] - 100).tolist())
    assert seen == Counter({example: 24 for example in range(SIZE)})


@pytest.mark.parametrize("config", [PUMA, RANDOM], ids=["puma", "random"])
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("interval", [1, 3])
def test_a_saved_group_resumes_exactly(config: ObjectiveConfig, steps: int, interval: int) -> None:
    place = {"first_step": min(2, interval), "interval": interval}
    first = group_of([2, 3, 4, 5], 8, config, **place)
    for number in range(place["first_step"], steps + 1, interval):
        step(first, number)
    second = group_of([2, 3, 4, 5], 8, config, **place)
    second.load_state_dict(first.state_dict(), steps + 1)
    following = steps + 1 + (place["first_step"] - steps - 1) % interval
    for number in range(following, following + 30 * interval, interval):
        one, two = step(first, number), step(second, number)
        assert one.input_ids.equal(two.input_ids)
        assert one.rows.equal(two.rows)
    for key, value in first.state_dict().items():
        np.testing.assert_array_equal(value, second.state_dict()[key])


def test_a_state_of_other_slots_is_refused() -> None:
    state = make([0, 1], 8, RANDOM).state_dict()
    with pytest.raises(ValueError, match="other slots"):
        make([2, 3], 8, RANDOM).load_state_dict(state, 1)


@pytest.mark.parametrize("config", [PUMA, RANDOM], ids=["puma", "random"])
def test_excluded_samples_never_come_again(config: ObjectiveConfig) -> None:
    """From a saved state on: chains of such examples are replaced, every other example is still used."""
    first = make(list(range(8)), 8, config)
    for number in range(1, 8):
        step(first, number)
    state = first.state_dict()
    now = [first.stream.index(position) for position in first.examples.ids.tolist()]
    excluded = {now[0], now[3], (now[0] + 1) % SIZE}
    second = make(list(range(8)), 8, config)
    second.stream.exclude(excluded)
    second.load_state_dict(state, 8)
    kept = [row for row, example in enumerate(now) if example not in excluded]
    assert second.state.masked[kept].equal(first.state.masked[kept]), "other chains go on where they were"
    seen = set()
    for number in range(8, 200):
        seen |= set((step(second, number).input_ids[:, 0] - 100).tolist())
    assert seen == set(range(SIZE)) - excluded


def test_too_many_excluded_samples_are_refused() -> None:
    with pytest.raises(Failure, match="left out as harmful"):
        make([0], 8, RANDOM).stream.exclude(range(SIZE // 2 + 1))
