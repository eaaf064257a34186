"""A growing batch: which example each slot is trained on at which step, against lists made by hand."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.chains.groups import SlotGroups
from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import Permutation, SlotStream
from pipeline.checkpoint.saving import merge_states
from pipeline.config import Config, LargerBatchConfig, ObjectiveConfig, TrainConfig
from pipeline.data.examples import Array
from pipeline.objectives import build
from pipeline.ranks import Ranks
from support.synthetic import Pairs
from support.walks import MASK, SEED, step

STAGES, STEPS = 4, 30
PUMA = ObjectiveConfig(stages=STAGES)
RANDOM = ObjectiveConfig(kind="random_masking")
TURNS = ObjectiveConfig(stages=STAGES, turns=3)
BATCHES = {1: 4, 6: 12, 7: 16, 18: 24}
ONE_MIX = {1: 61}  # examples of each phase of the data, by its first step
MIXES = {1: 61, 8: 43, 18: 50}  # the step after a growth, and the step of one
MIXES_OF_TURNS = {1: 61, 10: 43, 18: 50}  # as soon after a growth as it may be, and the step of one
CASES = {
    "puma": (PUMA, ONE_MIX),
    "puma-phases": (PUMA, MIXES),
    "random": (RANDOM, ONE_MIX),
    "random-phases": (RANDOM, MIXES),
    "turns": (TURNS, ONE_MIX),
    "turns-phases": (TURNS, MIXES_OF_TURNS),
}


@dataclass
class Meeting:
    """Where the threads that play ranks exchange their tensors."""

    barrier: threading.Barrier
    values: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Thread(Ranks):
    """A thread that plays a rank."""

    meeting: Meeting | None = None

    def max(self, values: Tensor) -> Tensor:
        """Exchange in memory."""
        assert self.meeting is not None
        self.meeting.values.append(values)
        self.meeting.barrier.wait(60)
        found = torch.stack(self.meeting.values).amax(dim=0)
        if self.meeting.barrier.wait(60) == 0:
            self.meeting.values.clear()
        self.meeting.barrier.wait(60)
        return found


class Marked(Pairs):
    """Pairs whose first token is 1000 x the first step of the phase, plus the index."""

    def __init__(self, first_step: int, size: int) -> None:
        super().__init__(size)
        self.first_step = first_step

    def __getitem__(self, index: int) -> dict[str, Array]:
        example = super().__getitem__(index)
        example["tokens"][0] = 1000 * self.first_step + index
        return example


class Run:
    """The chains of all ranks."""

    def __init__(
        self,
        objective: ObjectiveConfig,
        mixes: dict[int, int],
        ranks: int = 1,
        micro_batch: int = 4,
        batches: dict[int, int] = BATCHES,
        first_step: int = 1,
    ) -> None:
        (_, first), *larger = batches.items()
        ramp = [LargerBatchConfig(*each) for each in larger]
        train = TrainConfig(seed=SEED, steps=STEPS, global_batch_size=first, batch_ramp=ramp)
        self.config = config = Config("unused", objective=objective, train=train)
        config.train = train.fitted(ranks)
        config.train.micro_batch_size = min(micro_batch, config.train.micro_batch_size)
        meeting = Meeting(threading.Barrier(ranks))
        self.pool = ThreadPoolExecutor(ranks)
        objectives = build(config, MASK, True)
        self.ranks: list[SlotGroups] = []
        for rank in range(ranks):
            data, *later = ((begin, Marked(begin, size)) for begin, size in mixes.items())
            slots = {begin: size * objective.turns for begin, size in batches.items()}
            stream = SlotStream(data[1], slots.pop(1), SEED, 1, dict(later), slots)
            place = Thread(rank, ranks, meeting=meeting)
            self.ranks.append(SlotGroups(config, place, stream, objectives, first_step))

    def train(self, number: int) -> dict[int, int]:
        """Train step `number`; return the mark of the example of each slot."""
        marks: dict[int, int] = {}
        for groups in self.pool.map(lambda rank: rank.of_step(number), self.ranks):
            for group in groups:
                rows = group.examples.tokens[:, 0].tolist()
                marks |= dict(zip(group.slots.tolist(), rows, strict=True))
                step(group, number)
        return marks

    def groups(self) -> list[SlotGroup]:
        return [group for rank in self.ranks for group in rank]

    def resume(self, other: Run, done: int) -> None:
        """Continue after step `done` of the other run, as from its checkpoint."""
        saved = merge_states([group.state_dict() for group in other.groups()])
        rows = {slot: row for row, slot in enumerate(saved["slots"].tolist())}
        dealt = json.loads(json.dumps(other.ranks[0].stream.dealt))
        for rank in self.ranks:
            rank.begin(done + 1, {int(first): begun for first, begun in dealt.items()})
            for group in rank:
                of_group = [rows[slot] for slot in group.slots.tolist()]
                group.load_state_dict({key: each[of_group] for key, each in saved.items()}, done + 1)


def by_hand(
    objective: ObjectiveConfig, mixes: dict[int, int], begun: list[tuple[int, int, int]] | None = None
) -> dict[int, dict[int, int]]:
    """Return for each step the mark of the example of each slot, by the definition.

    The positions of a phase are a list. Its slots take every S-th of them, in order. Where S grows, those
    that no slot has taken make up a new list, of which the new slots take first. A slot whose chain ends
    takes its next example at once, of the phase at the step that will train it. `begun` gets that step, the
    phase and the epoch of each example.
    """
    turns, puma = objective.turns, objective.kind == "puma"
    found: dict[int, dict[int, int]] = {}
    left: dict[int, int] = {}  # steps of the chain that each slot is in
    holds: dict[int, int] = {}
    members: list[list[int]] = [[] for _ in range(turns)]  # slots of each turn
    taken: dict[int, set[int]] = {first: set() for first in mixes}
    hands: dict[int, list[list[int]]] = {}

    def phase_at(number: int) -> int:
        return max(first for first in mixes if first <= number)

    def slots_at(number: int) -> int:
        return turns * max(size for first, size in BATCHES.items() if first <= number)

    def deal(first: int, slots: int, first_slot: int) -> None:
        positions = list(islice((p for p in count() if p not in taken[first]), 2000))
        hands[first] = [positions[(slot - first_slot) % slots :: slots] for slot in range(slots)]

    def take(slot: int, number: int) -> None:
        first = phase_at(number)
        position = hands[first][slot].pop(0)
        assert position not in taken[first]
        taken[first].add(position)
        epoch, offset = divmod(position, mixes[first])
        if begun is not None:
            begun.append((number, first, epoch))
        holds[slot] = 1000 * first + Permutation(mixes[first], SEED, epoch, list(mixes).index(first))(offset)

    for first in mixes:
        deal(first, slots_at(first), 0)
    for number in range(1, STEPS + 1):
        if number in BATCHES:
            before = len(holds)
            if number not in mixes:
                deal(phase_at(number), slots_at(number), before)
            added = (slots_at(number) - before) // turns
            for turn, of_turn in enumerate(members):
                for slot in range(before + turn * added, before + (turn + 1) * added):
                    of_turn.append(slot)
                    left[slot] = STAGES - slot % STAGES if puma else 1
                    take(slot, number + (turn - number + 1) % turns)
        now = members[(number - 1) % turns]
        found[number] = {slot: holds[slot] for slot in now}
        for slot in now:
            left[slot] -= 1
            if left[slot] == 0:
                left[slot] = STAGES if puma else 1
                take(slot, number + turns)
    return found


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 4), (1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("case", CASES)
def test_each_step_trains_the_examples_of_the_list(case: str, ranks: int, micro_batch: int) -> None:
    expected, run = by_hand(*CASES[case]), Run(*CASES[case], ranks, micro_batch)
    for number in range(1, STEPS + 1):
        found = run.train(number)
        assert len(found) == run.config.train.batch_at(number)
        assert found == expected[number], number


@pytest.mark.slow
@pytest.mark.parametrize("done", [0, 5, 6, 7, 11, 17, 18, 25])
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_at_any_step_and_world_size(case: str, done: int) -> None:
    """From 2 ranks to 1 and 4, with chains of two or three deals under way; and once more."""
    objective, mixes = CASES[case]
    expected, first = by_hand(objective, mixes), Run(objective, mixes, 2, 2)
    for number in range(1, done + 1):
        first.train(number)
    for ranks in (1, 4):
        second, third = Run(objective, mixes, ranks, 1), Run(objective, mixes, 2, 2)
        second.resume(first, done)
        for number in range(done + 1, done + 3):
            assert second.train(number) == expected[number], number
        third.resume(second, done + 2)
        for number in range(done + 3, STEPS + 1):
            assert third.train(number) == expected[number], number


def test_the_future_of_the_ramp_may_change() -> None:
    """Ids, and so the noise, of what has begun depend on no later batch; nor does the checkpoint."""
    known, run = Run(PUMA, ONE_MIX, batches={1: 4, 6: 12}), Run(PUMA, ONE_MIX)
    for number in range(1, 7):
        known.train(number), run.train(number)
        ids = [torch.cat([group.examples.ids for group in each.groups()]).tolist() for each in (known, run)]
        assert ids[0] == ids[1]
    other = Run(PUMA, ONE_MIX)
    other.resume(known, 6)
    expected = by_hand(PUMA, ONE_MIX)
    for number in range(7, STEPS + 1):
        assert other.train(number) == expected[number], number


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_nothing_is_passed_over_and_nothing_comes_twice(threshold: float | None, turns: int) -> None:
    """Chains of all lengths: at each growth every position up to the last one is begun, or dealt anew."""
    run = Run(ObjectiveConfig(stages=STAGES, threshold=threshold, turns=turns), {1: 5000}, 2, 2)
    seen: set[int] = set()
    held: dict[int, set[int]] = {}  # by turn
    for number in range(1, STEPS + 1):
        run.train(number)
        groups = [group for rank in run.ranks for group in rank.of_step(number)]
        now = {id for group in groups for id in group.trained_ids.tolist()}
        assert not (now - held.get(number % turns, set())) & seen, "an example that left its slot came back"
        seen |= now
        held[number % turns] = now
        deal = run.ranks[0].stream.deals[-1]
        if number == 18:
            assert deal.known
            assert set(deal.left.tolist()) | set(range(deal.rest)) == set(range(deal.rest))
            assert len(deal.left) + deal.begun[0] == deal.rest, "begun or dealt anew, and never both"
    assert threshold is None or len(seen) > 140, "the threshold ends chains early"


def positions(run: Run, number: int) -> list[int]:
    """Train step `number`; return the positions of its examples in the stream, ascending: their ids."""
    run.train(number)
    return sorted(id for group in run.groups() for id in group.trained_ids.tolist())


def test_random_masking_uses_the_examples_in_order() -> None:
    """Without chains nothing is passed over: each step trains the examples that follow those of the last."""
    run, done = Run(RANDOM, ONE_MIX, 2, 2), 0
    for number in range(1, STEPS + 1):
        found = positions(run, number)
        assert found == list(range(done, done + run.config.train.batch_at(number))), number
        done += len(found)
    assert done == run.config.train.examples_until(STEPS) == 4 * 5 + 12 + 16 * 11 + 24 * 13


@pytest.mark.parametrize("case", CASES)
def test_epochs_are_counted(case: str) -> None:
    """A growth counts what waits for its turn at once."""
    objective, mixes = CASES[case]
    run, begun = Run(objective, mixes, 2, 2), list[tuple[int, int, int]]()
    by_hand(objective, mixes, begun)
    for number in range(1, STEPS + 1):
        run.train(number)
        if number > 5 and any(first <= number <= first + objective.turns - 2 for first in BATCHES):
            continue
        first = max(each for each in mixes if each <= number)
        epochs = [epoch for step, phase, epoch in begun if step <= number and phase == first]
        counts = np.sum([group.begun(number) for group in run.groups()], axis=0).tolist()
        assert counts == [len(epochs), epochs.count(0)], number


def test_every_step_trains_all_stages_in_equal_numbers() -> None:
    """The new slots begin at staggered stages, as those of the first batch do."""
    run = Run(PUMA, ONE_MIX)
    for number in range(1, STEPS + 1):
        run.train(number)
        stages = Counter(stage for group in run.groups() for stage in group.state.stage[:, 0].tolist())
        assert set(stages) == set(range(STAGES))
        assert len(set(stages.values())) == 1, number


def test_a_branch_begins_with_the_batch_of_its_step() -> None:
    """At step 9 it has 16 slots, whose examples are the first of the data; it grows like any run."""
    run, done = Run(RANDOM, ONE_MIX, 2, 2, first_step=9), 0
    for number in range(9, 12):
        assert positions(run, number) == list(range(done, done + 16))
        done += 16
    resumed = Run(RANDOM, ONE_MIX)
    resumed.resume(run, 11)
    for number in range(12, STEPS + 1):
        size = 16 if number < 18 else 24
        assert positions(resumed, number) == list(range(done, done + size))
        done += size


def test_stratified_ratios_stay_even() -> None:
    """A larger batch is several rounds of the first one's size, each of them spread evenly."""
    run = Run(ObjectiveConfig(kind="random_masking", stratified=True), ONE_MIX)
    for number in range(1, 20):
        run.train(number)
        ids = torch.cat([group.trained_ids for group in run.groups()]).tolist()
        rounds: dict[int, list[int]] = {}
        for id in ids:
            rounds.setdefault(id // 4, []).append(id % 4)
        assert all(sorted(each) == [0, 1, 2, 3] for each in rounds.values()), number


def test_excluded_examples_never_come_again() -> None:
    """Also where they are among those that are dealt anew."""
    run, clean = Run(PUMA, ONE_MIX), by_hand(PUMA, ONE_MIX)
    for number in range(1, 5):
        run.train(number)
    upcoming = {mark - 1000 for n in range(6, 9) for mark in clean[n].values()}
    now = {mark - 1000 for mark in clean[5].values()}
    excluded = sorted(upcoming - now)[:9]
    resumed = Run(PUMA, ONE_MIX)
    for rank in resumed.ranks:
        rank.stream.exclude(excluded)
    resumed.resume(run, 4)
    seen: set[int] = set()
    for number in range(5, STEPS + 1):
        seen |= set(resumed.train(number).values())
    assert seen == {1000 + index for index in range(61)} - {1000 + index for index in excluded}


def test_settings_count_batches_and_examples() -> None:
    ramp = [LargerBatchConfig(*each) for each in list(BATCHES.items())[1:]]
    train = TrainConfig(steps=STEPS, global_batch_size=4, batch_ramp=ramp)
    sizes = [4] * 5 + [12] + [16] * 11 + [24] * 13
    assert [train.batch_at(number) for number in range(1, STEPS + 1)] == sizes
    assert [train.examples_until(number) for number in range(STEPS + 1)] == [0, *np.cumsum(sizes).tolist()]
