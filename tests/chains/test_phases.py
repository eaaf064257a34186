"""Phases of the data: which example each slot is trained on at which step, against lists made by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.base.errors import Failure
from pipeline.chains.groups import slots_of_rank
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import Permutation, SlotStream
from pipeline.checkpoint.saving import merge_states
from pipeline.config import Config, ObjectiveConfig, TrainConfig
from pipeline.data.examples import Array
from pipeline.objectives import build
from support.synthetic import Pairs
from support.walks import MASK, SEED, step

SLOTS, STAGES, STEPS = 8, 4, 40
PUMA = ObjectiveConfig(stages=STAGES)
RANDOM = ObjectiveConfig(kind="random_masking")
SIZES = {1: 29, 9: 13, 22: 40}  # examples of each phase, by its first step
LAYOUTS = [(1, 1, 8), (1, 4, 2), (2, 2, 2), (4, 1, 2)]  # ranks, accumulation, micro-batch


class Marked(Pairs):
    """Pairs whose first token is 1000 x the first step of the phase, plus the index."""

    def __init__(self, first_step: int) -> None:
        super().__init__(SIZES[first_step])
        self.first_step = first_step

    def __getitem__(self, index: int) -> dict[str, Array]:
        example = super().__getitem__(index)
        example["tokens"][0] = 1000 * self.first_step + index
        return example


def stream_of(*first_steps: int, workers: int = 1) -> SlotStream:
    """Return a stream of the phases that begin at these steps."""
    first, *later = first_steps
    return SlotStream(Marked(first), SLOTS, SEED, workers, {step: Marked(step) for step in later})


def groups_of(
    config: ObjectiveConfig, layout: tuple[int, int, int], *first_steps: int, turn: int = 0, turns: int = 1
) -> list[SlotGroup]:
    """Return the groups of all ranks, each rank with a stream of its own."""
    ranks, accumulation, micro_batch = layout
    train = TrainConfig(seed=SEED, global_batch_size=SLOTS)
    objectives = build(Config("unused", objective=config, train=train), MASK, True)
    found = []
    for rank in range(ranks):
        stream = stream_of(*first_steps)
        for slots in slots_of_rank(rank, accumulation, micro_batch):
            group = SlotGroup(slots, stream, objectives, torch.device("cpu"), turn + 1, turns)
            found.append(group)
    return found


def trained(groups: list[SlotGroup], number: int) -> dict[int, int]:
    """Train step `number`; return the mark of the example of each slot."""
    marks = {}
    for group in groups:
        rows = group.examples.tokens[:, 0].tolist()
        marks |= dict(zip(group.slots.tolist(), rows, strict=True))
        step(group, number)
    return marks


def by_hand(config: ObjectiveConfig, turn: int = 0, turns: int = 1) -> dict[int, dict[int, int]]:
    """Return for each step the mark of the example of each slot, by the definition."""
    steps = range(turn + 1, STEPS + 1, turns)
    found: dict[int, dict[int, int]] = {number: {} for number in steps}
    for slot in range(SLOTS):
        used: Counter[int] = Counter()  # examples of each phase that the slot has begun
        left = 0
        for number in steps:
            if left == 0:  # a new example, from the phase of this step
                first = max(first for first in SIZES if first <= number)
                position = slot + used[first] * SLOTS
                epoch, offset = divmod(position, SIZES[first])
                phase = list(SIZES).index(first)
                mark = 1000 * first + Permutation(SIZES[first], SEED, epoch, phase)(offset)
                staggered = slot % STAGES if not sum(used.values()) else 0
                left = STAGES - staggered if config.kind == "puma" else 1
                used[first] += 1
            found[number][slot] = mark
            left -= 1
    return found


def test_the_first_phase_has_the_order_of_a_run_without_phases() -> None:
    """Its permutations, and so its ids and its noise: a phase can be appended to any run."""
    for epoch in range(3):
        one, other = Permutation(29, SEED, epoch), Permutation(29, SEED, epoch, 0)
        assert [one(i) for i in range(29)] == [other(i) for i in range(29)]
    with_phases, without = stream_of(1, 9), stream_of(1)
    assert [with_phases.read([3], [c]).ids for c in range(9)] == [3 + 8 * c for c in range(9)]
    assert [with_phases.index(i) for i in range(99)] == [without.index(i) for i in range(99)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [PUMA, RANDOM], ids=["puma", "random"])
def test_each_step_trains_the_examples_of_the_list(
    config: ObjectiveConfig, layout: tuple[int, int, int]
) -> None:
    """On 1, 2 and 4 ranks: chains end on their old examples, and every new one is of the new phase."""
    expected, groups = by_hand(config), groups_of(config, layout, *SIZES)
    for number in range(1, STEPS + 1):
        assert trained(groups, number) == expected[number], number
    phases = {mark // 1000 for number in range(9, 13) for mark in expected[number].values()}
    assert phases == ({1, 9} if config is PUMA else {9}), "the test has chains under way"


def test_every_step_trains_all_stages_in_equal_numbers() -> None:
    """Also at the first steps of a phase: no chain is cut, and no two slots fall into step."""
    groups = groups_of(PUMA, LAYOUTS[1], *SIZES)
    for number in range(1, STEPS + 1):
        stages = Counter(stage for group in groups for stage in group.state.stage[:, 0].tolist())
        assert stages == Counter({stage: SLOTS // STAGES for stage in range(STAGES)}), number
        trained(groups, number)


def test_turns_change_phase_at_the_same_step() -> None:
    """The second of three turns is trained at 2, 5, 8, 11: 11 is its first step of the phase from 9 on."""
    expected = by_hand(RANDOM, turn=1, turns=3)
    groups = groups_of(RANDOM, LAYOUTS[0], *SIZES, turn=1, turns=3)
    for number in expected:
        assert trained(groups, number) == expected[number], number
    assert {mark // 1000 for mark in expected[8].values()} == {1}
    assert {mark // 1000 for mark in expected[11].values()} == {9}


@pytest.mark.parametrize("done", [0, 3, 7, 8, 9, 14, 21, 22, 30])
@pytest.mark.parametrize("config", [PUMA, RANDOM], ids=["puma", "random"])
def test_a_run_resumes_in_any_phase_at_any_world_size(config: ObjectiveConfig, done: int) -> None:
    expected, first = by_hand(config), groups_of(config, LAYOUTS[2], *SIZES)
    for number in range(1, done + 1):
        trained(first, number)
    saved = merge_states([group.state_dict() for group in first])
    for layout in (LAYOUTS[0], LAYOUTS[3]):
        groups = groups_of(config, layout, *SIZES)
        for group in groups:
            group.load_state_dict({key: each[group.slots] for key, each in saved.items()}, done + 1)
        for number in range(done + 1, STEPS + 1):
            assert trained(groups, number) == expected[number], number


def test_a_phase_may_be_appended_and_a_future_one_changed() -> None:
    """The saved state depends on the phases that have begun alone."""
    expected = by_hand(PUMA)
    for done, known in ((7, (1,)), (7, (1, 22)), (20, (1, 9))):
        first = groups_of(PUMA, LAYOUTS[0], *known)
        for number in range(1, done + 1):
            trained(first, number)
        (group,) = groups = groups_of(PUMA, LAYOUTS[0], *SIZES)
        group.load_state_dict(first[0].state_dict(), done + 1)
        for number in range(done + 1, STEPS + 1):
            assert trained(groups, number) == expected[number], (done, number)


def test_every_example_of_a_phase_once_an_epoch() -> None:
    groups = groups_of(RANDOM, LAYOUTS[1], 1, 9)
    seen: Counter[int] = Counter()
    for number in range(1, 9 + 3 * 13):
        seen.update(trained(groups, number).values() if number >= 9 else trained(groups, number) and ())
    assert seen == Counter({9000 + index: 24 for index in range(13)})


def test_epochs_are_counted_in_the_phase_of_the_step() -> None:
    """Random masking begins 8 examples a step: 64 of the first phase, then 8, 16, ... of the second."""
    groups = groups_of(RANDOM, LAYOUTS[1], *SIZES)
    for number in range(1, 31):
        trained(groups, number)
        first = max(first for first in SIZES if first <= number)
        begun = 8 * (number - first + 1)
        counts = np.sum([group.begun(number) for group in groups], axis=0).tolist()
        assert counts == [begun, min(begun, SIZES[first])]


def test_examples_are_numbered_over_all_phases_and_left_out_by_number() -> None:
    stream = stream_of(*SIZES)
    ids = [stream.read([2], [stream.first_cursor(phase) + 5]).ids.item() for phase in range(3)]
    assert len(set(ids)) == 3
    for phase, (first, size) in enumerate(SIZES.items()):
        before = [0, 29, 42][phase]
        position = 2 + 5 * SLOTS
        index = Permutation(size, SEED, position // size, phase)(position % size)
        assert (stream.index(ids[phase]), stream.epoch(ids[phase])) == (before + index, position // size)
        assert stream.read([2], [stream.first_cursor(phase) + 5]).tokens[0, 0] == 1000 * first + index
    excluded = [stream.index(ids[1]), 3]
    stream.exclude(excluded)
    assert stream.admitted([2], [stream.first_cursor(1) + 5])[0] > stream.first_cursor(1) + 5
    assert stream.admitted([2], [stream.first_cursor(2) + 5])[0] == stream.first_cursor(2) + 5
    with pytest.raises(Failure, match="7 of 13 training examples"):
        stream.exclude(range(29, 36))


def test_a_prefetched_example_of_the_old_phase_is_not_used() -> None:
    """Threads read ahead in the old phase; what they read is dropped."""
    one, other = (stream_of(1, 9, workers=workers) for workers in (0, 2))
    for cursor in (0, 1, one.first_cursor(1), one.first_cursor(1) + 1):
        assert one.read(range(SLOTS), [cursor] * SLOTS).tokens.equal(
            other.read(range(SLOTS), [cursor] * SLOTS).tokens
        )
    other.close()


def test_stratified_ratios_stay_even_in_a_later_phase() -> None:
    """The slots of a batch that is no power of two share one draw in each phase: ids keep s modulo S."""
    stream = SlotStream(Pairs(30), 6, SEED, 0, {5: Pairs(20)})
    for cursor in (0, 3, stream.first_cursor(1), stream.first_cursor(1) + 2):
        ids = stream.read(range(6), [cursor] * 6).ids
        assert (ids % 6).tolist() == list(range(6))
        assert len(set((ids // 6).tolist())) == 1
