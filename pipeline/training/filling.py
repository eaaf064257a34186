"""Decoding by the engine that trains, whatever its sharding: the likeliest tokens, most confident first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.decoding.decoding import decode_by
from pipeline.decoding.sequences import Sequences
from pipeline.decoding.settings import SamplingSettings
from pipeline.engine.protocol import Engine
from pipeline.model.batch import HeadOutput
from pipeline.objectives.objective import Layout


class _Stopped(Exception):
    """The run is to stop."""


class EngineNetwork:
    """The model of an engine; see `pipeline.decoding.network.Network` for the methods.

    All ranks run as many forwards as the one that needs most, as ZeRO-3 needs, so no sequence leaves early.
    """

    drops_rows = False

    def __init__(self, engine: Engine, layout: Layout, step: int, stopped: Callable[[], bool]) -> None:
        """Take what `fill` was given."""
        self.engine = engine
        self.layout = layout
        self.step = step
        self.mask_id = layout.mask_id
        self.stopped = stopped

    def keep(self, rows: Tensor) -> None:
        """See `Network`: every sequence stays."""

    def is_done(self, alive: Tensor) -> bool:
        """See `Network`; all ranks must be done."""
        return not int(self.engine.ranks.max(alive.any().long()))

    def forward(self, now: Sequences, rows: Tensor) -> None:
        """See `Network`."""
        if self.stopped():
            raise _Stopped
        weights = torch.zeros(now.masked.shape, device=now.masked.device)
        batch = self.layout.batch(now.examples, now.masked, weights, int(now.masked.sum()), self.step)
        output = self.engine.evaluate(batch._replace(scores=("likeliest",)))
        where = torch.isin(batch.rows, rows)  # behind an end of sequence, nothing is filled
        likeliest = output.likeliest
        assert likeliest is not None
        self.tokens = likeliest[where]
        self.found = HeadOutput(output.loss, output.nll[where], output.confidence[where])

    def output(self, needs: tuple[str, ...]) -> HeadOutput:
        """See `Network`; the confidence is all that there is."""
        return self.found

    def draw(self, chosen: Tensor, settings: SamplingSettings, counters: tuple[Tensor, ...]) -> Tensor:
        """See `Network`: the likeliest tokens."""
        return self.tokens[chosen]


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

    Every rank calls this, with sequences of its own or the same.

    Args:
        engine: what runs the model.
        examples: tokens and roles; tokens at masked positions mean nothing.
        masked: [B, L] bool.
        layout: how the objective shows sequences to the model; its blocks are filled in turn.
        step: the optimizer step that the model has come to.
        at_once: tokens filled in each sequence at a forward; from left to right always one.
        stopped: asked before every forward whether to give up; all ranks must answer alike.
        stop: the end-of-sequence token; what is behind one that is filled in is left alone.

    Returns:
        Tokens [B, L] and the forward [B, L] at which each was filled, -1 where nothing was; nothing at all
        when it was given up.
    """
    examples = replace(examples, tokens=examples.tokens.clone())
    now = Sequences.start(examples, masked, layout.decoding(examples), None)
    settings = SamplingSettings(tokens_per_step=at_once)
    if layout.attention == "causal":
        settings = SamplingSettings(policy="left_to_right")
    try:
        decoded = decode_by(EngineNetwork(engine, layout, step, stopped), now, settings, stop)
    except _Stopped:
        return None
    return decoded.tokens, decoded.order
