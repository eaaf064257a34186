"""What the model writes in the place of validation examples, by the engine that trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.data.examples import PROMPT, ExampleDataset, Examples, stack_examples
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.frames import pieces
from pipeline.engine.protocol import Engine
from pipeline.monitor.texts import ShownText
from pipeline.objectives.objective import Layout
from pipeline.training.filling import fill

FORWARDS = 32  # for a whole text
IN_TURN = 64  # tokens of a text that is written block by block, or from left to right


def write_texts(
    engine: Engine,
    dataset: ExampleDataset,
    count: int,
    layout: Layout,
    tokenizer: Tokenizer,
    step: int,
    stopped: Callable[[], bool] = lambda: False,
) -> list[ShownText]:
    """Mask the answers of the first examples, or the second half where there is no prompt, and fill them in.

    The likeliest tokens are taken, those of the highest confidence first. Every rank calls this and runs the
    same forwards, as ZeRO-3 needs.

    Args:
        engine: what runs the model.
        dataset: validation examples.
        count: how many of them.
        layout: how the objective shows sequences to the model.
        tokenizer: of the model.
        step: the optimizer step that the model has come to.
        stopped: asked before every forward whether to give up; all ranks must answer alike.

    Returns:
        The texts; none when it was given up.
    """
    if count == 0:
        return []
    examples = stack_examples([dataset[i] for i in range(count)], range(count)).to(engine.ranks.device)
    masked = to_be_written(examples, layout)
    at_once = -(-int(masked.sum(dim=1).max()) // FORWARDS)
    found = fill(engine, examples, masked, layout, step, at_once, stopped)
    if found is None:
        return []
    tokens, order = (x.tolist() for x in found)
    return [_shown(tokenizer, row, places, step) for row, places in zip(tokens, order, strict=True)]


def to_be_written(examples: Examples, layout: Layout) -> Tensor:
    """Return [B, L] bool: the answer or, where there is no prompt, its second half.

    Where nothing is seen of what is behind, the first `IN_TURN` tokens are enough.
    """
    answer = layout.chains(examples).answer
    has_prompt = (examples.roles == PROMPT).any(dim=1, keepdim=True)
    rank = answer.cumsum(dim=1) - 1
    first = torch.where(has_prompt, 0, answer.sum(dim=1, keepdim=True) // 2)
    masked = answer & (rank >= first)
    return masked if layout.attention == "bidirectional" else masked & (rank < first + IN_TURN)


def _shown(tokenizer: Tokenizer, tokens: Sequence[int], order: Sequence[int], step: int) -> ShownText:
    """Return a row as text, up to its last written token or the first end of sequence among them."""
    written = [place for place, number in enumerate(order) if number >= 0]
    ends = [place for place in written if tokens[place] == tokenizer.eos]
    end = min([1 + max(written, default=-1), *ends])
    numbers = [number if number >= 0 else None for number in order[:end]]
    return ShownText(step, pieces(tokenizer, tokens[:end]), numbers)
