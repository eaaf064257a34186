"""The statistics of the chains against plain loops over the same scores."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from pipeline.chains.slots import SlotGroup
from pipeline.chains.statistics import ChainFigures
from pipeline.chains.stream import SlotStream
from pipeline.config import ModelConfig, ObjectiveConfig
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.mixture import Mixture
from support import oracles
from support.synthetic import Pairs
from support.walks import MASK, SEED, SIZE, WIDTH, group_of

STAGES, SLOTS, STEPS = 5, 6, 40
PUMA = ObjectiveConfig(stages=STAGES)
THRESHOLD = ObjectiveConfig(stages=STAGES, threshold=0.7)
BLOCKS = ObjectiveConfig(stages=STAGES, threshold=0.7, block_size=2)
RANDOM = ObjectiveConfig("random_masking")
PAIRS_OF_MASKS = ObjectiveConfig("random_masking", complementary=True)
MIXTURE = ObjectiveConfig(stages=STAGES, threshold=0.7, random_share=0.5)


def scored(batch: MaskedBatch, number: int) -> tuple[HeadOutput, np.ndarray]:
    """Return a model's answer: random confidences, and at random rows the truth is the likeliest token."""
    random = np.random.default_rng([number, *batch.rows[:1].tolist()])
    confidence = torch.from_numpy(random.uniform(0.05, 1.0, len(batch.rows)).astype(np.float32))
    right = random.random(len(batch.rows)) < 0.5
    likelihood = np.where(right, confidence, confidence * random.uniform(0.01, 0.99, len(batch.rows)))
    return HeadOutput(torch.zeros(()), -torch.log(torch.from_numpy(likelihood)).float(), confidence), right


class Observed:
    """What loops over sequences and positions find."""

    def __init__(self) -> None:
        self.lists: dict[str, list[float]] = defaultdict(list)
        self.bins: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))

    def walk(self, group: SlotGroup, number: int, block: int) -> MaskedBatch:
        """Train a step of the group without a model, and look at every position of it."""
        batch = group.inputs(number)
        roles, ids = group.examples.roles.numpy(), group.examples.ids.tolist()
        masked, stage = group.state.masked.numpy(), group.state.stage.numpy()
        output, right = scored(batch, number)
        at = {row: place for place, row in enumerate(batch.rows.tolist())}
        fractions, stages = [], []
        for slot in range(len(ids)):
            answer = np.flatnonzero(roles[slot] == 2)
            fractions.append(masked[slot].sum() / len(answer))
            for first in range(0, len(answer), block):
                positions = answer[first : first + block]
                hidden = [p for p in positions if masked[slot, p]]
                if hidden:
                    stages.append(stage[slot, first // block])
                for p in hidden:
                    place = at[slot * WIDTH + p]
                    nll, confidence = float(output.nll[place]), float(output.confidence[place])
                    tenth = int(np.ceil(10 * len(hidden) / len(positions))) - 1
                    self.bins["loss_by_mask_ratio"][tenth].append(nll)
                    self.bins["loss_by_stage"][int(stage[slot, first // block])].append(nll)
                    self.bins["accuracy_by_confidence"][int(confidence * 10)].append(right[place])
                    self.bins["confidence"][int(confidence * 10)].append(confidence)
        self.lists["fraction"].append(float(np.mean(fractions)))
        self.lists["stage"].append(float(np.mean(stages)))
        ages = group.age.tolist()
        self.lists["age"] += [age + 1 for age in ages]
        group.advance(batch, output, number)
        now = group.examples.ids.tolist()
        self.lists["length"] += [age + 1 for age, old, new in zip(ages, ids, now, strict=True) if old != new]
        return batch


def figures_of(group: SlotGroup, steps: int = STEPS) -> ChainFigures:
    """Return what the group's own statistics say."""
    return group.statistics.figures(group.statistics.take().tolist(), steps)


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (PUMA, WIDTH),
        (THRESHOLD, WIDTH),
        (BLOCKS, 2),
        (RANDOM, WIDTH),
        (PAIRS_OF_MASKS, WIDTH),
        (MIXTURE, WIDTH),
    ],
    ids=["puma", "threshold", "blocks", "random", "pairs", "mixture"],
)
def test_figures_equal_those_of_loops(config: ObjectiveConfig, block: int) -> None:
    group, observed = group_of(list(range(SLOTS)), SLOTS, config), Observed()
    ages = {slot: 0 for slot in range(SLOTS)}
    for number in range(1, STEPS + 1):
        assert group.age.tolist() == list(ages.values())
        before = group.examples.ids.tolist()
        observed.walk(group, number, block)
        same = [one == two for one, two in zip(before, group.examples.ids.tolist(), strict=True)]
        ages = {slot: ages[slot] + 1 if same[slot] else 0 for slot in ages}
    figures = figures_of(group)
    names = [f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)]
    labels = {"loss_by_stage": [f"{i:02d}" for i in range(STAGES)]}
    for name, found in figures.bins.items():
        label = labels.get(name, names)
        expected = {label[i]: np.mean(values) for i, values in observed.bins[name].items()}
        assert found == pytest.approx(expected, rel=1e-6), name
    confidence, accuracy = observed.bins["confidence"], observed.bins["accuracy_by_confidence"]
    everything = [value for values in confidence.values() for value in values]
    error = sum(len(confidence[i]) * abs(np.mean(confidence[i]) - np.mean(accuracy[i])) for i in confidence)
    scalars = figures.scalars
    assert scalars["calibration/error"] == pytest.approx(error / len(everything), rel=1e-5)
    assert scalars["calibration/confidence"] == pytest.approx(np.mean(everything))
    assert scalars["calibration/accuracy"] == pytest.approx(
        np.mean([x for v in accuracy.values() for x in v])
    )
    assert scalars["masked_fraction"] == pytest.approx(np.mean(observed.lists["fraction"]))
    assert scalars["mean_stage"] == pytest.approx(np.mean(observed.lists["stage"]))
    assert scalars["chains_ended_per_step"] == pytest.approx(len(observed.lists["length"]) / STEPS)
    assert scalars["chains/mean_length"] == pytest.approx(np.mean(observed.lists["length"]))
    assert figures.masked_rows == pytest.approx(len(everything) / STEPS)
    assert figures.prompt_length == pytest.approx(2)
    histograms = figures.histograms
    assert histograms["confidence"].counts == [len(confidence[i]) for i in range(10)]
    for name in ("age", "length"):
        edges, counts = histograms[f"chain_{name}"]
        assert counts == np.histogram(observed.lists[name], edges)[0].tolist()
        assert sum(counts) == len(observed.lists[name])


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_reveals_equal_those_of_the_oracle(threshold: float | None) -> None:
    """Positions revealed by rank and by the threshold, in chains that go on to another step."""
    group = group_of(list(range(SLOTS)), SLOTS, ObjectiveConfig(stages=STAGES, threshold=threshold))
    data, stream = Pairs(SIZE), SlotStream(Pairs(SIZE), SLOTS, SEED, workers=0)
    cursors, chains = [0] * SLOTS, dict[int, oracles.Chain]()
    continuing, ranked, by_threshold = 0, 0, 0
    for number in range(1, STEPS + 1):
        for slot in set(range(SLOTS)) - set(chains):
            position = slot + cursors[slot] * SLOTS
            answer = np.flatnonzero(data[stream.index(position)]["roles"] == 2).tolist()
            chains[slot] = oracles.Chain(SEED, position, answer, lambda _: STAGES, threshold)
            chains[slot].begin(slot % STAGES if cursors[slot] == 0 else 0, number)
        batch = group.inputs(number)
        output, _ = scored(batch, number)
        values = dict(zip(batch.rows.tolist(), output.confidence.tolist(), strict=True))
        group.advance(batch, output, number)
        for slot, chain in list(chains.items()):
            everywhere = {i: values.get(slot * WIDTH + i, 0.0) for i in chain.answer}
            chain.advance(everywhere, everywhere, number)
            if chain.ended:
                del chains[slot]
                cursors[slot] += 1
                continue
            continuing += 1
            ranked += chain.revealed[0]
            by_threshold += chain.revealed[1]
    scalars = figures_of(group).scalars
    assert (by_threshold > 0) == (threshold is not None)
    assert scalars["chains/reveals_per_step"] == pytest.approx((ranked + by_threshold) / continuing)
    assert scalars["chains/threshold_share"] == pytest.approx(by_threshold / (ranked + by_threshold))


def test_random_masking_reveals_nothing() -> None:
    """What is masked no more was not revealed by a score there: no figure instead of a wrong one."""
    group = group_of(list(range(SLOTS)), SLOTS, PAIRS_OF_MASKS)
    for number in range(1, 5):
        Observed().walk(group, number, WIDTH)
    assert "chains/reveals_per_step" not in figures_of(group, 4).scalars


def test_a_mixture_counts_the_reveals_of_its_chains_alone() -> None:
    """Sequences under random masks are not among the chains that go on."""
    group = group_of(list(range(SLOTS)), SLOTS, MIXTURE)
    mixture = group.objectives.at(1)
    assert isinstance(mixture, Mixture)
    random, continuing = 0, 0
    for number in range(1, STEPS + 1):
        is_random, before = mixture.is_random(group.examples), group.examples.ids
        Observed().walk(group, number, WIDTH)
        same = group.examples.ids == before
        random += int((is_random & same).sum())
        continuing += int((~is_random & same).sum())
    sums = group.statistics.take()
    assert random > 0
    assert sums[group.statistics.places["reveals_chains"]].tolist() == [continuing]


def test_grouping_changes_no_figure() -> None:
    """6 slots in one group, or in three whose sums are added up: the same figures to rounding."""
    found = []
    for parts in ([range(6)], [range(2), range(2, 4), range(4, 6)]):
        groups = [group_of(part, SLOTS, THRESHOLD) for part in parts]
        for number in range(1, STEPS + 1):
            for group in groups:
                batch = group.inputs(number)
                example, position = group.examples.ids[batch.rows // WIDTH], batch.rows % WIDTH
                score = 0.05 + ((example * 7919 + position * 104729 + number) % 89).float() / 100
                group.advance(batch, HeadOutput(torch.zeros(()), -score.log(), score), number)
        sums = torch.stack([group.statistics.take() for group in groups]).sum(dim=0)
        found.append(groups[0].statistics.figures(sums.tolist(), STEPS))
    one, several = found
    assert set(one.scalars) == set(several.scalars)
    for name in set(one.scalars) - {"mean_stage"}:  # a mean over micro-batches, which weigh alike
        assert one.scalars[name] == pytest.approx(several.scalars[name]), name
    for name, bins in one.bins.items():
        assert bins == pytest.approx(several.bins[name])
    for name, histogram in one.histograms.items():
        assert histogram.counts == pytest.approx(several.histograms[name].counts)


def test_accuracy_is_that_of_the_argmax() -> None:
    """A real head's NLL and confidence tell whether the likeliest token is the true one."""
    torch.manual_seed(0)
    model = MaskedDiffusionModel(ModelConfig(layers=1, hidden_size=16), Vocabulary(160, 150, MASK))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that it is right or wrong for sure
    group = group_of(list(range(SLOTS)), SLOTS, PUMA)
    right, total = 0, 0
    for number in range(1, STEPS + 1):
        batch = group.inputs(number)
        likeliest = model.logits(batch.input_ids, batch.rows, batch.attention_mask).argmax(dim=-1)
        half = torch.arange(len(likeliest)) % 2 == 0  # the truth is what the model says, at every other row
        batch = batch._replace(targets=torch.where(half, likeliest, batch.targets))
        right += int((likeliest == batch.targets).sum())
        total += len(likeliest)
        with torch.no_grad():
            group.advance(batch, model(batch), number)
    assert 0.4 * total < right < 0.7 * total
    assert figures_of(group).scalars["calibration/accuracy"] == pytest.approx(right / total)


def test_long_chains_share_bins() -> None:
    """With more stages than bins, neighbouring stages fall into one, named by the first of them."""
    group = group_of(list(range(SLOTS)), SLOTS, ObjectiveConfig(stages=100))
    observed = Observed()
    for number in range(1, STEPS + 1):
        observed.walk(group, number, WIDTH)
    starts = [int(np.ceil(i * 100 / 64)) for i in range(64)]
    expected: dict[str, list[float]] = defaultdict(list)
    for stage, values in observed.bins["loss_by_stage"].items():
        expected[f"{max(start for start in starts if start <= stage):02d}"] += values
    found = figures_of(group).bins["loss_by_stage"]
    assert found == pytest.approx({name: np.mean(values) for name, values in expected.items()})


def test_a_saved_group_keeps_its_ages() -> None:
    group = group_of(list(range(SLOTS)), SLOTS, THRESHOLD)
    for number in range(1, 8):
        Observed().walk(group, number, WIDTH)
    other = group_of(list(range(SLOTS)), SLOTS, THRESHOLD)
    state = group.state_dict()
    other.load_state_dict(state, 8)
    assert len(set(group.age.tolist())) > 1
    assert other.age.tolist() == group.age.tolist()
    del state["age"]  # as older checkpoints are
    other.load_state_dict(state, 8)
    assert other.age.tolist() == [0] * SLOTS
