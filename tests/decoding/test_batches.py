"""For networks of every layout, decoding depends neither on the batch nor on the cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Examples
from pipeline.decoding.batching import MaskedSequence, stack
from pipeline.decoding.decoding import decode
from pipeline.decoding.network import CachedNetwork, ModelNetwork
from pipeline.decoding.sampling import SamplingSettings
from pipeline.decoding.sequences import Sequences
from pipeline.model.batch import Visibility, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole

pytestmark = pytest.mark.slow

MASK, SIZE, STOP = 3, 40, 5
LAYOUTS = {
    "whole": Whole(MASK, True),
    "whole, shifted": Whole(MASK, True, True),
    "blocks": Blocks(MASK, True, size=3),
    "blocks, shifted": Blocks(MASK, True, True, size=4),
    "left to right": LeftToRight(MASK, True, True),
}
SETTINGS = {
    "likeliest": SamplingSettings(tokens_per_step=2),
    "drawn": SamplingSettings("margin", temperature=1.0, top_p=0.9),
    "threshold": SamplingSettings(threshold=0.3, temperature=0.7),
    "remasked": SamplingSettings(steps=4, temperature=1.0, remasking="rescale", eta=0.5),
}


def network(shifted: bool) -> MaskedDiffusionModel:
    """Return a network with grouped queries whose outputs depend on all visible positions."""
    torch.manual_seed(0)
    config = ModelConfig(
        layers=2,
        hidden_size=32,
        heads=4,
        kv_heads=2,
        intermediate_size=48,
        init_std=0.4,
        prediction="shifted" if shifted else "same",
    )
    return MaskedDiffusionModel(config, Vocabulary(SIZE, SIZE, MASK)).eval()


def prompts(count: int) -> list[tuple[list[int], int]]:
    """Return prompts of different lengths, and the answer length of each."""
    generator = torch.Generator().manual_seed(1)
    lengths = [(1 + 3 * i % 7, 4 + 5 * i % 9) for i in range(count)]
    return [(torch.randint(6, SIZE, (a,), generator=generator).tolist(), b) for a, b in lengths]


def batch_of(numbers: list[int]) -> tuple[Examples, Tensor]:
    """Return some of the prompts as a batch, padded at the end."""
    parts = [prompts(10)[i] for i in numbers]
    length = max(len(ids) + more for ids, more in parts)
    tokens = torch.full((len(parts), length), 0)
    roles = torch.full((len(parts), length), PADDING)
    for row, (ids, more) in enumerate(parts):
        tokens[row, : len(ids)], roles[row, : len(ids)] = torch.tensor(ids), PROMPT
        roles[row, len(ids) : len(ids) + more] = ANSWER
    return Examples(tokens, roles, torch.tensor(numbers)), roles == ANSWER


def filled(layout: Whole, settings: SamplingSettings, numbers: list[int]) -> list[tuple[list[int], ...]]:
    """Return tokens, order and steps of each prompt's answer, decoded in one batch."""
    examples, masked = batch_of(numbers)
    result = decode(network(layout.first_given), examples, masked, settings, layout.decoding(examples), STOP)
    return [
        (result.tokens[row][masked[row]].tolist(), result.order[row][masked[row]].tolist(), [int(steps)])
        for row, steps in enumerate(result.steps)
    ]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_batch_changes_nothing(layout: Whole, settings: SamplingSettings) -> None:
    """Ten prompts give the same tokens alone, in batches of three or eight, and in another order."""
    together = filled(layout, settings, list(range(10)))
    for size in (1, 3, 8):
        parts = [list(range(10))[start : start + size] for start in range(0, 10, size)]
        assert [one for part in parts for one in filled(layout, settings, part)] == together
    shuffled = [7, 2, 9, 0, 4]
    assert filled(layout, settings, shuffled) == [together[i] for i in shuffled]
    if settings.temperature:
        other = SamplingSettings(**(vars(settings) | {"seed": 1}))
        assert filled(layout, other, list(range(10))) != together


class Both(CachedNetwork):
    """Run the forward with and without the cache, and compare the hidden states."""

    seen = 0

    def __init__(self, model: MaskedDiffusionModel, visibility: Visibility, now: Sequences) -> None:
        super().__init__(model, visibility, now)
        self.whole = ModelNetwork(model, visibility)

    def predict(self, now: Sequences, rows: Tensor) -> Tensor:
        """Return the hidden states without the cache."""
        found, expected = super().predict(now, rows), self.whole.predict(now, rows)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        Both.seen += len(rows)
        return expected


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", list(LAYOUTS.values())[2:], ids=list(LAYOUTS)[2:])
def test_the_cache_changes_nothing(
    layout: Whole, settings: SamplingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states at every step, and the result, equal those of full forwards."""
    numbers = list(range(10))
    cached = filled(layout, settings, numbers)
    assert cached == filled(layout, SamplingSettings(**(vars(settings) | {"cache": False})), numbers)
    monkeypatch.setattr("pipeline.decoding.decoding.CachedNetwork", Both)
    Both.seen = 0
    assert filled(layout, settings, numbers) == cached
    assert Both.seen > 50


def test_the_cache_saves_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4 given tokens and 2 blocks of 3, each block is computed at its 3 steps and once when finished."""
    model, computed = network(False), []
    extend = model.model.extend

    def counted(ids: Tensor, *rest: object) -> Tensor:
        computed.append(ids.numel())
        return extend(ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model.model, "extend", counted)
    tokens = torch.full((1, 10), 7)
    roles = torch.where(torch.arange(10)[None] < 4, PROMPT, ANSWER)
    examples = Examples(tokens, roles, torch.arange(1))
    layout = Blocks(MASK, True, size=3)
    decode(model, examples, examples.answer, SamplingSettings(), layout.decoding(examples))
    assert computed == [4 + 3, 3, 3, 3 + 3, 3, 3]


@pytest.mark.parametrize(("kind", "blocks"), [("packed", [0, 0, 0, 1, 1, 1]), ("pairs", [0, 0, 1, 1, 1, 2])])
def test_blocks_begin_where_they_did_in_training(kind: str, blocks: list[int]) -> None:
    """In packed text, blocks start at the first token; in pairs, at the first answer token."""
    loaded = SimpleNamespace(
        config=SimpleNamespace(data=SimpleNamespace(kind=kind)),
        tokenizer=SimpleNamespace(pad=0),
        model=network(False),
    )
    sequences = [MaskedSequence.behind([7, 8], [MASK] * 4)]
    examples, masked = stack(loaded, sequences, [0])  # type: ignore[arg-type]
    found = Blocks(MASK, True, size=3).decoding(examples).blocks
    assert found is not None
    assert (found - found[:, :1]).tolist() == [blocks]
    assert masked.tolist() == [[False, False, True, True, True, True]]
