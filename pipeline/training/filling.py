"""Decoding by the engine that trains, whatever its sharding: greedy, in the order of confidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.engine.runtime import Engine
from pipeline.objectives.layouts import LeftToRight
from pipeline.objectives.objective import Layout, Scores, positions_like, take_highest


def fill(
    engine: Engine,
    examples: Examples,
    masked: Tensor,
    layout: Layout,
    step: int,
    at_once: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    stop: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Fill the positions `masked` [B, L] with the likeliest tokens, the most confident first.

    Every rank calls this, with sequences of its own or the same. All run as many forwards as the one that
    needs most, as ZeRO-3 needs.

    Args:
        engine: what runs the model.
        examples: tokens and roles; tokens at masked positions mean nothing.
        masked: [B, L] bool.
        layout: how the objective shows sequences to the model; its blocks are filled in turn.
        step: the optimizer step that the model has come to.
        at_once: tokens filled in each sequence at a forward; from left to right always one.
        stopped: asked before every forward whether to give up; all ranks must answer alike.
        stop: the end-of-sequence token; what is behind one that is filled in is left alone, as in
            `decoding.decode`.

    Returns:
        Tokens [B, L] and the forward [B, L] at which each was filled, -1 where nothing was; nothing at all
        when it was given up.
    """
    chains, in_turn = layout.chains(examples), isinstance(layout, LeftToRight)
    order, left = torch.full_like(examples.tokens, -1), masked
    count = torch.full_like(examples.ids, 1 if in_turn else at_once)
    number = 0
    while int(engine.max_over_ranks(left.sum())):
        if stopped():
            return None
        rows = int(masked.sum())
        batch = layout.batch(examples, masked, torch.zeros(masked.shape, device=masked.device), rows, step)
        output = engine.evaluate(batch._replace(scores=("likeliest",)))
        assert output.likeliest is not None
        index = chains.index.masked_fill(~left, chains.count)
        candidates = left & (index == index.amin(dim=1, keepdim=True))  # of the first block that is left
        confidence = Scores.of(output, batch.rows, masked).confidence
        ranking = -positions_like(examples.tokens).double().expand(masked.shape) if in_turn else confidence
        revealed = take_highest(candidates, ranking, count)
        likeliest = examples.tokens.flatten().index_copy(0, batch.rows, output.likeliest).view_as(masked)
        examples = replace(examples, tokens=torch.where(revealed, likeliest, examples.tokens))
        order = order.masked_fill(revealed, number)
        masked = left = masked & ~revealed
        if stop is not None:
            ends = (order >= 0) & (examples.tokens == stop)
            left = masked & (ends.cumsum(dim=1) == 0)
        number += 1
    return examples.tokens, order
