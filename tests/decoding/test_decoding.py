"""Decoding against plain Python loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.data.examples import ANSWER, PROMPT, Examples
from pipeline.decoding.decoding import decode
from pipeline.decoding.sampling import SamplingSettings
from pipeline.model.batch import Visibility, Vocabulary
from pipeline.model.masked_head import MaskedHead
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole
from support.filling import fill

MASK, SIZE = 3, 12


class HashModel:
    """A model whose logits depend on the whole row, with many ties between confidences.

    Its hidden states are the logits; the head is a real one with a unit matrix.
    """

    def __init__(self) -> None:
        self.lm_head = MaskedHead(nn.Parameter(torch.eye(SIZE)), Vocabulary(SIZE, SIZE, MASK))

    def model(self, ids: Tensor, attention_mask: Tensor | None, visibility: Visibility) -> Tensor:
        """Return logits [B, L, V]."""
        return torch.tensor(
            np.stack([[self.one(row, i) for i in range(len(row))] for row in ids.numpy()]),
            dtype=torch.float32,
        )

    def outputs_of(self, rows: Tensor, length: int, visibility: Visibility) -> Tensor:
        """Return `rows`: no shifted prediction."""
        return rows

    @staticmethod
    def one(row: np.ndarray, position: int) -> np.ndarray:
        """Return the logits of one position."""
        key = int((row * np.arange(1, len(row) + 1)).sum()) * 31 + position // 2
        return np.random.default_rng(key % 7).permutation(SIZE) / 2.0


def samples_of(tokens: Tensor, masked: Tensor) -> Examples:
    """Return examples whose masked positions are the answer."""
    return Examples(tokens, torch.where(masked, ANSWER, PROMPT), torch.arange(len(tokens)))


class Smooth(HashModel):
    """A HashModel without ties."""

    @staticmethod
    def one(row: np.ndarray, position: int) -> np.ndarray:
        """Return the logits of one position."""
        return np.random.default_rng([*row.tolist(), position]).normal(0, 2, SIZE)


SETTINGS = {
    "one": SamplingSettings(),
    "three": SamplingSettings(tokens_per_step=3),
    "steps": SamplingSettings(steps=3),
    "more steps than tokens": SamplingSettings(steps=50),
    "margin": SamplingSettings("margin", 2, temperature=1.0),
    "entropy": SamplingSettings("entropy", temperature=0.5, seed=3),
    "random": SamplingSettings("random", 2, temperature=1.3, top_k=4),
    "left to right": SamplingSettings("left_to_right", temperature=1.0, top_p=0.7),
    "threshold": SamplingSettings(threshold=0.5, temperature=1.0, top_k=5, top_p=0.9),
    "own blocks": SamplingSettings(tokens_per_step=2, block_size=3),
    "cap": SamplingSettings(tokens_per_step=2, temperature=1.0, remasking="cap", eta=0.3),
    "rescale": SamplingSettings("random", steps=12, temperature=1.0, remasking="rescale", eta=0.9),
    "rescale in blocks": SamplingSettings(block_size=4, temperature=1.0, remasking="rescale", eta=0.5),
}


@pytest.mark.parametrize("stop", [None, 5], ids=["to-the-end", "with-an-end"])
@pytest.mark.parametrize(
    ("settings", "kind"),
    [*((settings, Smooth) for settings in SETTINGS.values()), (SETTINGS["three"], HashModel)],
    ids=[*SETTINGS, "ties"],
)
def test_equals_a_plain_loop(settings: SamplingSettings, kind: type[HashModel], stop: int | None) -> None:
    """Rows with different numbers of masks, zero included, equal a plain loop over each row."""
    random = np.random.default_rng(1)
    tokens = random.integers(4, SIZE, (6, 9))
    masked = random.random((6, 9)) < np.array([0, 0.2, 0.5, 0.7, 0.9, 1.0])[:, None]
    examples = samples_of(torch.from_numpy(tokens), torch.from_numpy(masked))
    result = decode(kind(), examples, examples.answer, settings, stop=stop)  # type: ignore[arg-type]
    for row in range(6):
        answer = np.flatnonzero(masked[row]).tolist()
        size = settings.block_size or 99
        blocks = {i: number // size for number, i in enumerate(answer)}
        expected = fill(tokens[row], blocks, row, settings, kind.one, MASK, stop)
        np.testing.assert_array_equal(result.tokens[row], expected.tokens)
        np.testing.assert_array_equal(result.order[row], expected.order)
        assert result.steps[row] == expected.steps
        if stop is None:
            assert MASK not in expected.tokens


class Reversed(HashModel):
    """A model with a higher confidence at later positions."""

    def model(self, ids: Tensor, attention_mask: Tensor | None, visibility: Visibility) -> Tensor:
        """Return logits [B, L, V]."""
        position = torch.arange(ids.shape[1])
        logits = torch.zeros(*ids.shape, SIZE)
        logits[:, position, 4 + position % 7] = 1.0 + position / 10
        return logits


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        (Whole(MASK, False), [-1, 2, 1, 1, 0, 0]),
        (Blocks(MASK, False, size=3), [-1, 1, 0, 0, 2, 2]),
        (LeftToRight(MASK, False, first_given=True), [-1, 0, 1, 2, 3, 4]),
    ],
    ids=["whole", "blocks", "left-to-right"],
)
def test_blocks_are_filled_one_after_another(layout: Whole, order: list[int]) -> None:
    """Two tokens per step, the most confident first, within the first block that has masks."""
    tokens = torch.tensor([[5, 0, 0, 0, 0, 0]])
    masked = torch.tensor([[False, True, True, True, True, True]])
    examples, settings = samples_of(tokens, masked), SamplingSettings(tokens_per_step=2, cache=False)
    result = decode(Reversed(), examples, masked, settings, layout.decoding(examples))  # type: ignore[arg-type]
    assert result.order.tolist() == [order]
    assert result.tokens.tolist() == [[5, *(4 + i % 7 for i in range(1, 6))]]


@pytest.mark.parametrize("kind", ["blocks", "left-to-right"])
def test_decoding_sees_what_training_showed(kind: str) -> None:
    """Greedy decoding of a real model equals a loop that sees only tokens up to the current block."""
    torch.manual_seed(2)
    config = ModelConfig(
        layers=2, hidden_size=32, heads=4, intermediate_size=48, init_std=0.4, prediction="shifted"
    )
    model = MaskedDiffusionModel(config, Vocabulary(SIZE, SIZE, MASK)).eval()
    layout = LeftToRight(MASK, False, True) if kind == "left-to-right" else Blocks(MASK, False, True, size=3)
    tokens = torch.randint(4, SIZE, (1, 9))
    masked = torch.arange(9)[None] >= 2
    examples = samples_of(tokens, masked)
    visibility = layout.decoding(examples)
    result = decode(model, examples, masked, SamplingSettings(), visibility)
    assert visibility.blocks is not None
    expected, width = tokens.clone(), 1 if kind == "left-to-right" else 3
    for start in range(2, 9, width):
        end = min(9, start + width)
        left = set(range(start, end))
        while left:
            ids = expected[:, :end].clone()
            ids[0, sorted(left)] = MASK
            blocks = visibility.blocks[:, :end]
            with torch.no_grad():
                hidden = model.model(ids, None, Visibility(blocks))[0]
                p = model.lm_head.logits(hidden[[i - 1 for i in sorted(left)]]).softmax(-1)
            best = int(p.amax(-1).argmax())
            position = sorted(left)[best]
            expected[0, position] = int(p[best].argmax())
            left.remove(position)
    assert result.tokens.equal(expected)
