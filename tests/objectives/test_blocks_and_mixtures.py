"""Blocks with chains of their own, mixtures and switches, slot by slot, against chains of the oracle."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import ObjectiveConfig
from pipeline.objectives import noise
from pipeline.objectives.autoregressive import Autoregressive
from pipeline.objectives.mixture import Mixture
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.random_masking import RandomMasking
from pipeline.objectives.seam import Scores
from support import oracles
from support.synthetic import Pairs
from support.walks import SEED, SIZE, WIDTH, group_of, output, step

SLOTS = 6


def run(objective: ObjectiveConfig, prediction: str = "same", slots: int = SLOTS) -> SlotGroup:
    """Return a group of all slots."""
    return group_of(range(slots), slots, objective, prediction)


def answer(example: dict[str, np.ndarray]) -> list[int]:
    """Return the answer positions of an example."""
    return np.flatnonzero(example["roles"] == 2).tolist()


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_each_block_walks_a_chain_of_its_own(threshold: float | None) -> None:
    """A sequence stays until all its blocks have ended; an ended block is clean and out of the loss."""
    stages = 4
    group = run(ObjectiveConfig(stages=stages, threshold=threshold, block_size=2))
    data, stream = Pairs(SIZE), SlotStream(Pairs(SIZE), SLOTS, SEED, workers=0)
    cursors, chains = [0] * SLOTS, [list[oracles.Chain]() for _ in range(SLOTS)]
    uneven = 0
    for number in range(1, 50):
        expected = {}
        for slot in range(SLOTS):
            position = slot + cursors[slot] * SLOTS
            if not chains[slot]:
                places = answer(data[stream.index(position)])
                for block in range(0, len(places), 2):
                    chain = oracles.Chain(
                        SEED,
                        position,
                        places[block : block + 2],
                        lambda _: stages,
                        threshold,
                        number=block // 2,
                    )
                    chain.begin(slot % stages if cursors[slot] == 0 else 0, number)
                    chains[slot].append(chain)
            live = [chain for chain in chains[slot] if not chain.ended]
            uneven += len(live) < len(chains[slot])
            for chain in live:
                weight = 1 / (len(chain.masked) * len(live) * SLOTS)
                expected |= {slot * WIDTH + i: weight for i in chain.masked}
        batch = group.inputs(number)
        assert dict(zip(batch.rows.tolist(), batch.weights.tolist(), strict=True)) == pytest.approx(expected)
        assert batch.weights.sum().item() == pytest.approx(1)
        scores = output(group, batch)
        values = dict(zip(batch.rows.tolist(), scores.confidence.tolist(), strict=True))
        group.advance(batch, scores, number)
        for slot in range(SLOTS):
            for chain in chains[slot]:
                if not chain.ended:
                    everywhere = {i: values.get(slot * WIDTH + i, 0.0) for i in chain.answer}
                    chain.advance(everywhere, everywhere, number)
            if all(chain.ended for chain in chains[slot]):
                chains[slot] = []
                cursors[slot] += 1
    assert min(cursors) > 5
    assert (uneven > 0) == (threshold is not None)


def test_a_share_of_the_sequences_shows_random_masks() -> None:
    """Which ones is a hash of the sequence; they stay as long as a chain, masked anew at each stage."""
    stages, share = 3, 0.4
    group = run(ObjectiveConfig(stages=stages, random_share=share, policy="entropy"), slots=12)
    assert isinstance(group.objectives.at(1), Mixture)
    randomly, inputs = 0, 0
    begun = group.examples.ids.clone()
    for number in range(1, 40):
        ids, stage, masked = group.examples.ids, group.state.stage[:, 0], group.state.masked
        begun = torch.cat([begun, ids])
        where = noise.uniform(SEED, noise.MIXTURE, ids) < share
        for row in where.nonzero().flatten().tolist():
            places = group.examples.answer[row].nonzero().flatten().tolist()
            expected = oracles.random_mask(SEED, int(ids[row]), places, int(stage[row]))
            assert set(masked[row].nonzero().flatten().tolist()) == expected
        randomly, inputs = randomly + int(where.sum()), inputs + len(where)
        step(group, number)
    unique = begun.unique()
    of_sequences = (noise.uniform(SEED, noise.MIXTURE, unique) < share).double().mean().item()
    assert of_sequences == pytest.approx(share, abs=0.12)
    assert randomly / inputs == pytest.approx(of_sequences, abs=0.05), "inputs as sequences"
    lengths = Counter(begun.tolist())
    assert {lengths[int(i)] for i in unique[(unique > 12) & (unique < 120)]} == {stages}


def test_the_chains_of_a_mixture_are_those_without_it() -> None:
    """A sequence that is not masked at random walks exactly as it would alone."""
    mixed, plain = (run(ObjectiveConfig(stages=3, random_share=share)) for share in (0.4, 0.0))
    for number in range(1, 20):
        alike = ~(noise.uniform(SEED, noise.MIXTURE, mixed.examples.ids) < 0.4)
        assert mixed.examples.ids.equal(plain.examples.ids)
        assert mixed.state.masked[alike].equal(plain.state.masked[alike])
        assert alike.any()
        step(mixed, number)
        step(plain, number)


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        ("random_masking", "puma", (RandomMasking, ProgressiveUnmasking)),
        ("puma", "random_masking", (ProgressiveUnmasking, RandomMasking)),
        ("autoregressive", "puma", (Autoregressive, ProgressiveUnmasking)),
    ],
)
def test_a_switch_begins_every_chain_anew(first: str, second: str, kinds: tuple[type, type]) -> None:
    """At its step all slots take their next example, at the stages that the new objective begins with."""
    at, stages = 7, 3
    annealed = 4 if first == "autoregressive" else 0  # steps of causal attention and less and less of it
    config = ObjectiveConfig(first, second, at, stages=stages, attention_annealing_steps=annealed)  # type: ignore[arg-type]
    group = run(config, "shifted")
    assert [type(group.objectives.at(s)) for s in (1, at - 1)] == [kinds[0]] * 2
    assert [type(group.objectives.at(s)) for s in (at, 10**6)] == [kinds[1]] * 2
    before = np.zeros(SLOTS)
    for number in range(1, 16):
        group._settle()
        if number == at:
            assert (group.cursors == before + 1).all()
            fresh = group.objectives.at(at).first_stage(torch.arange(SLOTS), at)[:, None]
            expected = group.objectives.at(at).begin(group.chains, fresh, at)
            assert group.state.masked.equal(expected.masked)
            assert group.state.stage.equal(expected.stage)
            assert second != "puma" or group.state.stage.unique().tolist() == list(range(stages))
        before = group.cursors.copy()
        batch = step(group, number)
        assert (batch.visibility.blocks is not None) == (first == "autoregressive" and number < at + annealed)
        assert (batch.visibility.also_visible is not None) == (at <= number < at + annealed)
        if annealed and number == at:
            assert not batch.visibility.also_visible.any(), "the first masked step is causal still"


@pytest.mark.parametrize(
    "config",
    [
        ObjectiveConfig(stages=3, block_size=2, threshold=0.7),
        ObjectiveConfig(
            stages=2, stages_increment=1, stages_first_increase=3, stages_interval=4, threshold=0.8
        ),
        ObjectiveConfig(stages=4, random_share=0.3, complementary=True, policy="margin"),
        ObjectiveConfig("random_masking", complementary=True, stratified=True),
        ObjectiveConfig("random_masking", mask_count="bernoulli", stratified=True, block_size=3),
        ObjectiveConfig("random_masking", "puma", 12, stages=3),
    ],
    ids=["blocks", "growing-k", "mixture", "pairs", "bernoulli-blocks", "switch"],
)
@pytest.mark.parametrize("steps", [0, 9, 11, 12])
def test_every_objective_resumes_exactly_from_its_arrays(config: ObjectiveConfig, steps: int) -> None:
    """Cursors and arrays with one row a slot are the whole state: no generator, no counter of steps."""
    first, second = run(config), run(config)
    for number in range(1, steps + 1):
        step(first, number)
    state = first.state_dict()
    assert all(len(value) == SLOTS for value in state.values())
    second.load_state_dict(state, steps + 1)
    for number in range(steps + 1, steps + 15):
        one, two = step(first, number), step(second, number)
        for field in ("input_ids", "rows", "weights"):
            assert getattr(one, field).equal(getattr(two, field))


def test_position_0_is_given_where_predictions_are_shifted() -> None:
    """It is never masked; a sequence with no other position has no loss and makes room at once."""
    group = run(ObjectiveConfig(stages=3), "shifted")
    group.examples.roles[0] = 0
    group.examples.roles[0, 0] = 2  # an answer of one token at position 0
    group.examples.roles[1, :2] = 2  # an answer that begins at position 0
    objective = group.objectives.at(1)
    chains = objective.layout.chains(group.examples)
    state = objective.begin(chains, torch.zeros(SLOTS, 1, dtype=torch.int64), 1)
    assert not state.masked[:, 0].any()
    assert not state.masked[0].any()
    assert chains.length[1] == group.examples.answer_length[1] - 1
    group.state = state
    weights = objective.weights(chains, state)
    assert weights[state.masked].isfinite().all()
    zeros = torch.zeros(SLOTS, WIDTH)
    _, ended, _ = objective.advance(chains, state, Scores(zeros), 1, 2)
    assert ended.tolist()[0]
    assert not ended.all()
