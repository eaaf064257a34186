"""Texts that the model writes while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.examples import ANSWER, stack_examples
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.animation import colour_of
from pipeline.decoding.decoding import decode
from pipeline.decoding.sampling import SamplingSettings
from pipeline.engine.plain import PlainEngine
from pipeline.monitor.texts import ShownText, as_html, as_picture, as_plain, read_texts
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole
from pipeline.objectives.seam import Layout
from pipeline.training.shown_texts import FORWARDS, IN_TURN, fill, to_be_written, write_texts
from support.synthetic import MASK, Pairs, sharp_engine


@pytest.fixture
def engine() -> Iterator[PlainEngine]:
    """Return a small model whose tokens differ in how likely they are."""
    with sharp_engine(80, "shifted", 20.0) as engine:
        yield engine


@pytest.mark.parametrize(
    "layout",
    [Whole(MASK, True, True), Blocks(MASK, True, True, size=5), LeftToRight(MASK, True, True)],
    ids=["whole", "blocks", "left-to-right"],
)
def test_fills_as_the_sampler_does(engine: PlainEngine, layout: Layout) -> None:
    """The same tokens in the same order as the sampler, which asks the model for logits."""
    data = Pairs(6, longest=76)
    examples = stack_examples([data[i] for i in range(6)], range(6))
    masked = to_be_written(examples, layout)
    at_once = 1 if isinstance(layout, LeftToRight) else -(-int(masked.sum(dim=1).max()) // FORWARDS)
    found = fill(engine, examples, masked, layout, 1, SamplingSettings(tokens_per_step=at_once))
    assert found is not None
    policy = "left_to_right" if isinstance(layout, LeftToRight) else "confidence"
    settings = SamplingSettings(policy=policy, tokens_per_step=at_once)
    if not isinstance(layout, Whole) or isinstance(layout, Blocks | LeftToRight):
        examples.roles[(examples.roles == ANSWER) & ~masked] = 0  # behind what is written: never seen
    expected = decode(engine.model, examples, masked, settings, layout.decoding(examples))  # type: ignore[arg-type]
    for row in range(6):
        assert found[0][row][masked[row]].equal(expected.tokens[row][masked[row]])
        assert found[1][row].equal(expected.order[row])


def test_what_is_to_be_written() -> None:
    """Answers where there is a prompt; else the second half; less where nothing behind is seen."""
    data = Pairs(3, longest=100)
    examples = stack_examples([data[i] for i in range(3)], range(3))
    whole = Whole(MASK, True)
    assert to_be_written(examples, whole).equal(examples.answer)
    text = replace(examples, roles=torch.full_like(examples.roles, ANSWER))
    assert to_be_written(text, whole).nonzero()[:, 1].unique().tolist() == list(range(51, 102))
    assert to_be_written(text, Blocks(MASK, True, size=4)).sum(dim=1).tolist() == [51] * 3
    longer = replace(text, tokens=text.tokens.repeat(1, 2), roles=text.roles.repeat(1, 2))
    assert to_be_written(longer, LeftToRight(MASK, True)).sum(dim=1).tolist() == [IN_TURN] * 3


def test_a_stop_gives_up(engine: PlainEngine, data: Path) -> None:
    tokenizer = Tokenizer.load(data / "tokenizer")
    assert write_texts(engine, Pairs(6), 2, Whole(MASK, True), tokenizer, 1, lambda: True) == []
    assert write_texts(engine, Pairs(6), 0, Whole(MASK, True), tokenizer, 1) == []


def test_a_run_writes_its_texts(run_dir: Path) -> None:
    """Two at each evaluation; a resumed run writes none twice."""
    texts = read_texts(run_dir)
    assert [text.step for text in texts] == [8, 8, 16, 16]
    for text in texts:
        given = text.order.index(0) if 0 in text.order else 0
        numbers = [number for number in text.order if number is not None]
        assert text.order[0] is None
        assert text.order[:given].count(None) > 0
        assert sorted(set(numbers)) == list(range(text.steps))


def test_pictures_and_pages_show_the_order() -> None:
    pieces = ["It begins", *["some", " <words>", " and\nmore"] * 60]
    text = ShownText(7, pieces, [None, *range(180)])
    assert text.steps == 180
    picture = as_picture(text)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    present = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    for number in (0, 90, 179):
        assert tuple(bytes.fromhex(colour_of(number, 180)[1:])) in present
    page = as_html(text)
    assert "&lt;words&gt;" in page
    assert page.count("<b ") == 180
    assert f'background:{colour_of(179, 180)}" title="step 180"' in page


def test_plain_text_marks_what_was_written() -> None:
    assert as_plain(ShownText(1, ["a", "b", "c", "d"], [None, 1, 0, None])) == "a⟦bc⟧d"
    assert as_plain(ShownText(1, ["a", "b"], [None, 0])) == "a⟦b⟧"
    assert as_plain(ShownText(1, ["a"], [None])) == "a"
