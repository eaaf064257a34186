"""Examples of random length: how many, how long, and that nothing but seed and index decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import objectives
from pipeline.base.errors import UserError
from pipeline.chains.stream import SlotStream
from pipeline.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from pipeline.data.examples import ANSWER, PADDING, Array, stack_examples
from pipeline.data.lengths import RandomLengths
from pipeline.model.batch import MaskedBatch, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.seam import model_input

FULL, PAD, SIZE, MASK = 40, 1, 50, 4


class Packed:
    """Examples of 40 tokens in documents of 8, tokens 5 and above."""

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> dict[str, Array]:
        tokens = np.random.default_rng(index).integers(5, SIZE, FULL)
        documents = np.repeat(np.arange(5, dtype=np.int32), 8)
        return {"tokens": tokens, "roles": np.full(FULL, ANSWER, np.int8), "documents": documents}


def kept(example: dict[str, Array]) -> int:
    """Return the tokens in front of the padding, and check what is behind them."""
    length = int((example["roles"] == ANSWER).sum())
    assert (example["roles"][length:] == PADDING).all()
    assert (example["tokens"][length:] == PAD).all()
    assert (example["documents"][length:] == (length - 1) // 8).all()
    return length


def test_a_share_of_the_examples_has_a_uniform_length() -> None:
    """The share within 4 standard deviations, the lengths by chi-square; the tokens are as they were."""
    data, cut = Packed(), RandomLengths(Packed(), 0.25, seed=7, pad=PAD)
    assert len(cut) == len(data)
    lengths = []
    for index in range(len(data)):
        example, whole = cut[index], data[index]
        length = kept(example)
        for name, values in example.items():
            assert (values[:length] == whole[name][:length]).all()
        lengths.append(length)
    short = np.array([length for length in lengths if length < FULL])
    expected = 0.25 * (FULL - 2) / (FULL - 1)  # a drawn length may be the full one
    deviation = (expected * (1 - expected) / len(data)) ** 0.5
    assert len(short) / len(data) == pytest.approx(expected, abs=4 * deviation)
    counts = np.bincount(short, minlength=FULL)
    assert counts[:2].sum() == 0
    mean = len(short) / (FULL - 2)
    assert ((counts[2:FULL] - mean) ** 2 / mean).sum() < 69.3  # 99.9% quantile, 37 degrees of freedom


def test_seed_and_index_alone_decide() -> None:
    """Any order, any number of slots and of threads; another seed cuts others."""
    cut = RandomLengths(Packed(), 0.5, seed=7, pad=PAD)
    lengths = {index: kept(cut[index]) for index in range(200)}
    again = RandomLengths(Packed(), 0.5, seed=7, pad=PAD)
    assert {index: kept(again[index]) for index in reversed(range(200))} == lengths
    other = RandomLengths(Packed(), 0.5, seed=8, pad=PAD)
    assert {index: kept(other[index]) for index in range(200)} != lengths
    for slots in (1, 4):
        stream = SlotStream(cut, slots, 3, workers=slots - 1)
        for cursor in range(8 // slots):
            examples = stream.read(range(slots), [cursor] * slots)
            for slot, roles in enumerate(examples.roles):
                index = stream.index(slot + cursor * slots)
                assert int((roles == ANSWER).sum()) == cut.length(index, FULL)
        stream.close()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("block_size", [None, 4])
def test_a_cut_example_is_trained_as_the_short_text_alone(block_size: int | None, apart: bool) -> None:
    """NLL of a batch of cut rows equals that of each text without its padding."""
    torch.manual_seed(0)
    settings = ModelConfig(layers=2, hidden_size=32, heads=4, intermediate_size=48, init_std=0.3)
    model = MaskedDiffusionModel(settings, Vocabulary(SIZE, SIZE, MASK))
    kind = ObjectiveConfig("random_masking", block_size=block_size)
    cut = RandomLengths(Packed(), 1.0, seed=7, pad=PAD)
    rows = [dict(cut[index]) for index in range(3)]
    if not apart:
        for row in rows:
            del row["documents"]

    def batch_of(part: list[dict[str, Array]], ids: list[int], padded: bool) -> MaskedBatch:
        objective = objectives.build(Config("unused", objective=kind), MASK, padded).at(1)
        chains = objective.layout.chains(stack_examples(part, ids))
        state = objective.begin(chains, torch.zeros(len(part), 1, dtype=torch.int64), 1)
        return model_input(objective, chains, state, int(state.masked.sum()), 1)

    together = model(batch_of(rows, [0, 1, 2], True)).nll
    alone = []
    for number, row in enumerate(rows):
        length = int((row["roles"] == ANSWER).sum())
        part = {name: values[:length] for name, values in row.items()}
        alone.append(model(batch_of([part], [number], False)).nll)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_shares_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.random_length_share is 1.5: give a share from 0 to 1"):
        DataConfig(prefixes=["x"], random_length_share=1.5).check(1)
    with pytest.raises(UserError, match=r"data.random_length_share is 0.1, which has no effect .* 'pairs'"):
        DataConfig(prefixes=["x"], kind="pairs", random_length_share=0.1).check(1)
