"""Texts that the model writes during training: validation examples with their answers filled anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.data.examples import PROMPT, ExampleDataset, Examples, stack_examples
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.frames import pieces
from pipeline.decoding.sampling import SamplingSettings
from pipeline.engine.protocol import Engine
from pipeline.monitor.texts import ShownText
from pipeline.objectives.seam import Layout
from pipeline.training.filling import fill

FORWARDS = 32  # of a whole text
IN_TURN = 64  # tokens written block by block, or from left to right


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

    The likeliest tokens are taken, most confident first. Every rank calls this.

    Args:
        engine: runs the model.
        dataset: validation examples.
        count: number of examples.
        layout: shows sequences to the model.
        tokenizer: tokenizer of the model.
        step: current optimizer step.
        stopped: whether to stop, asked before every forward; all ranks must agree.

    Returns:
        The texts; none after a stop.
    """
    if count == 0:
        return []
    examples = stack_examples([dataset[i] for i in range(count)], range(count)).to(engine.ranks.device)
    masked = to_be_written(examples, layout)
    at_once = -(-int(masked.sum(dim=1).max()) // FORWARDS)
    settings = SamplingSettings(tokens_per_step=at_once)
    found = fill(engine, examples, masked, layout, step, settings, stopped)
    if found is None:
        return []
    tokens, order = (x.tolist() for x in found)
    return [_shown(tokenizer, row, places, step) for row, places in zip(tokens, order, strict=True)]


def to_be_written(examples: Examples, layout: Layout) -> Tensor:
    """Return the positions to write, [B, L] bool: the answer or, without a prompt, its second half.

    With causal attention, or attention by blocks, the first `IN_TURN` tokens of it.
    """
    answer = layout.chains(examples).answer
    has_prompt = (examples.roles == PROMPT).any(dim=1, keepdim=True)
    rank = answer.cumsum(dim=1) - 1
    first = torch.where(has_prompt, 0, answer.sum(dim=1, keepdim=True) // 2)
    masked = answer & (rank >= first)
    return masked if layout.attention == "bidirectional" else masked & (rank < first + IN_TURN)


def _shown(tokenizer: Tokenizer, tokens: Sequence[int], order: Sequence[int], step: int) -> ShownText:
    """Return a row as text, up to its last written token or its first written end of sequence."""
    written = [place for place, number in enumerate(order) if number >= 0]
    ends = [place for place in written if tokens[place] == tokenizer.eos]
    end = min([1 + max(written, default=-1), *ends])
    numbers = [number if number >= 0 else None for number in order[:end]]
    return ShownText(step, pieces(tokenizer, tokens[:end]), numbers)
