"""Decoding by the engine that trains, under any sharding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.data.examples import Examples
from pipeline.decoding.decoding import decode_by
from pipeline.decoding.drawing import draw_from
from pipeline.decoding.sampling import SamplingSettings
from pipeline.decoding.sequences import Sequences
from pipeline.engine.protocol import Engine
from pipeline.model.batch import HeadOutput
from pipeline.objectives.seam import Layout

GREEDY = SamplingSettings()


class _Stopped(Exception):
    """The run is to stop."""


class EngineNetwork:
    """The model of an engine; see `pipeline.decoding.network.Network` for the methods.

    ZeRO-3 needs as many forwards on each rank, so no sequence leaves early. The engine returns no logits, so
    each forward draws a token for every candidate, before it is known which of them are filled.
    """

    drops_rows = False

    def __init__(
        self,
        engine: Engine,
        layout: Layout,
        step: int,
        settings: SamplingSettings,
        stopped: Callable[[], bool],
    ) -> None:
        """Take what `fill` was given."""
        self.engine = engine
        self.layout = layout
        self.step = step
        self.settings = settings
        self.mask_id = layout.mask_id
        self.stopped = stopped

    def keep(self, rows: Tensor) -> None:
        """See `Network`: every sequence stays."""

    def is_done(self, alive: Tensor) -> bool:
        """See `Network`; all ranks must be done."""
        return not int(self.engine.ranks.max(alive.any().long()))

    def forward(self, now: Sequences, rows: Tensor) -> None:
        if self.stopped():
            raise _Stopped
        weights = torch.zeros(now.masked.shape, device=now.masked.device)
        batch = self.layout.batch(now.examples, now.masked, weights, int(now.masked.sum()), self.step)
        ids, length = now.examples.ids, now.masked.shape[1]

        def draw(logits: Tensor, places: Tensor) -> Tensor:
            row, position = places // length, places % length
            return draw_from(logits, self.settings, (ids[row], position, torch.full_like(row, now.step)))

        output = self.engine.evaluate(batch._replace(draw=draw))
        where = torch.isin(batch.rows, rows)  # positions behind an end of sequence stay masked
        assert output.drawn is not None
        self.tokens = output.drawn[where]
        self.found = HeadOutput(output.loss, output.nll[where], output.confidence[where])

    def output(self, needs: tuple[str, ...]) -> HeadOutput:
        """See `Network`; it has the confidence only."""
        return self.found

    def draw(self, chosen: Tensor, settings: SamplingSettings, counters: tuple[Tensor, ...]) -> Tensor:
        """See `Network`: the tokens of the last forward."""
        return self.tokens[chosen]


def fill(
    engine: Engine,
    examples: Examples,
    masked: Tensor,
    layout: Layout,
    step: int,
    settings: SamplingSettings = GREEDY,
    stopped: Callable[[], bool] = lambda: False,
    stop: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Fill the positions `masked` [B, L], the most confident first.

    Every rank calls this, with the same or different sequences.

    Args:
        engine: runs the model.
        examples: tokens and roles; tokens at masked positions are not used.
        masked: [B, L] bool.
        layout: shows sequences to the model; its blocks are filled one after another.
        step: current optimizer step.
        settings: of the sampler, with the confidence as policy; a causal model is always decoded a token at a
            time from left to right.
        stopped: whether to stop, asked before every forward; all ranks must agree.
        stop: the end-of-sequence token; positions behind a filled one are left masked.

    Returns:
        Tokens [B, L], and the forward [B, L] that filled each of them, -1 at other positions; None after a
        stop.
    """
    examples = replace(examples, tokens=examples.tokens.clone())
    now = Sequences.start(examples, masked, layout.decoding(examples), None)
    if layout.attention == "causal":
        settings = replace(settings, policy="left_to_right", tokens_per_step=1)
    try:
        decoded = decode_by(EngineNetwork(engine, layout, step, settings, stopped), now, settings, stop)
    except _Stopped:
        return None
    return decoded.tokens, decoded.order
