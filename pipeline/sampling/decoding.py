"""The decoding loop: at each step the positions that the policy ranks highest are filled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import PADDING, Samples
from pipeline.model.batch import Visibility
from pipeline.model.transformer import EVERYTHING, MaskedDiffusionModel
from pipeline.objectives.base import Scores, take_highest
from pipeline.objectives.policies import POLICIES
from pipeline.sampling.drawing import draw_tokens
from pipeline.sampling.settings import SamplingSettings

UNFILLED = -1


@dataclass
class Sequences:
    """Sequences on their way from masks to tokens; those that are done have left.

    Attributes:
        rows: [B] int64, which row of the caller's batch each is.
        samples: tokens, of which those at masked positions mean nothing, roles, and the prompts' numbers.
        masked: [B, L] bool, what is still to be filled.
        order: [B, L] int64, the step at which each position was filled; UNFILLED elsewhere.
        blocks: [B, L] int64, the block of each position: blocks are filled one after another.
        step: how many steps there have been.
    """

    rows: Tensor
    samples: Samples
    masked: Tensor
    order: Tensor
    blocks: Tensor
    step: int = 0

    def candidates(self, stop: int | None) -> Tensor:
        """Return what may be filled now, [B, L] bool: a row without candidates is done.

        These are the masked positions of the first block that has any. Positions behind a token `stop` that
        has been filled in are none: they are no part of the answer.
        """
        left = self.masked
        if stop is not None:
            stops = (self.order != UNFILLED) & (self.samples.tokens == stop)
            left = left & (stops.cumsum(dim=1) == 0)
        blocks = torch.where(left, self.blocks, self.blocks.max() + 1)
        return left & (blocks == blocks.amin(dim=1, keepdim=True))

    def kept(self, keep: Tensor) -> Sequences:
        """Return the rows where `keep` [B] bool holds."""
        tokens, roles, ids = (x[keep] for x in (self.samples.tokens, self.samples.roles, self.samples.ids))
        masked, order, blocks = (x[keep] for x in (self.masked, self.order, self.blocks))
        return Sequences(self.rows[keep], Samples(tokens, roles, ids), masked, order, blocks, self.step)


@dataclass
class Decoded:
    """What decoding made of B sequences.

    Attributes:
        tokens: [B, L] int64; the mask token where nothing was filled, behind an end-of-sequence token.
        order: [B, L] int64, the step (0 is the first) at which each position was filled; UNFILLED elsewhere.
        steps: [B] int64, forwards that each sequence took part in.
    """

    tokens: Tensor
    order: Tensor
    steps: Tensor

    def keep(self, sequences: Sequences, where: Tensor, mask_id: int) -> None:
        """Take over the rows of `sequences` where `where` [B] bool holds."""
        rows = sequences.rows[where]
        self.tokens[rows] = sequences.samples.tokens.masked_fill(sequences.masked, mask_id)[where]
        self.order[rows] = sequences.order[where]
        self.steps[rows] = sequences.step


@torch.no_grad()
def decode(
    model: MaskedDiffusionModel,
    samples: Samples,
    masked: Tensor,
    settings: SamplingSettings,
    visibility: Visibility = EVERYTHING,
    stop: int | None = None,
    on_step: Callable[[Sequences], None] | None = None,
) -> Decoded:
    """Fill the masked positions.

    At each step the policy ranks the candidates by the scores of one forward, as it does along a chain in
    training; then tokens are drawn at the positions that it has chosen. As the choice does not look at what
    is drawn, an exact model at temperature 1 and one token a step is sampled from exactly, in any order.

    Args:
        model: the network.
        samples: tokens, roles (PADDING is not seen) and the prompts' numbers, by which their noise differs.
        masked: [B, L] bool; rows may have different counts.
        settings: checked settings.
        visibility: which positions see which others (`Layout.decoding`); its blocks are filled in turn.
        stop: the end-of-sequence token; a row is done when one is filled in with nothing masked before it.
        on_step: called after each step with the sequences that took part in it.
    """
    mask_id = model.lm_head.vocabulary.mask_id
    blocks = torch.zeros_like(samples.tokens) if visibility.blocks is None else visibility.blocks
    now = Sequences(
        torch.arange(len(masked), device=masked.device),
        samples,
        masked,
        torch.full_like(samples.tokens, UNFILLED),
        blocks.expand_as(masked),
    )
    result = Decoded(samples.tokens.clone(), now.order.clone(), torch.zeros_like(now.rows))
    while True:
        candidates = now.candidates(stop)
        alive = candidates.any(dim=1)
        result.keep(now, ~alive, mask_id)
        if not alive.any():
            return result
        now, candidates = now.kept(alive), candidates[alive]
        _step(model, now, candidates, settings, visibility)
        if on_step is not None:
            on_step(now)


def _step(
    model: MaskedDiffusionModel,
    now: Sequences,
    candidates: Tensor,
    settings: SamplingSettings,
    visibility: Visibility,
) -> None:
    """Run one forward on `now` and fill the best of the candidates [B, L]."""
    policy = POLICIES[settings.policy]
    rows = candidates.flatten().nonzero().squeeze(1)  # [R]
    hidden = _hidden(model, now, rows, visibility)  # [R, H]
    unknown = torch.zeros_like(rows)  # no target: the loss means nothing
    output = model.lm_head(hidden, unknown, unknown.float(), policy.needs)
    scores = Scores.of(output, rows, candidates)
    count = torch.full_like(now.rows, settings.tokens_per_step)
    filled = take_highest(candidates, policy.ranking(settings.seed, now.samples, scores), count)
    if settings.threshold is not None:
        filled |= candidates & (scores.confidence > settings.threshold)
    places = filled.flatten().nonzero().squeeze(1)  # [F]
    row, position = places // filled.shape[1], places % filled.shape[1]
    counters = (now.samples.ids[row], position, torch.full_like(row, now.step))
    tokens = draw_tokens(model.lm_head, hidden[filled.flatten()[rows]], settings, counters)
    now.samples.tokens[row, position] = tokens
    now.order = now.order.masked_fill(filled, now.step)
    now.masked = now.masked & ~filled
    now.step += 1


def _hidden(model: MaskedDiffusionModel, now: Sequences, rows: Tensor, visibility: Visibility) -> Tensor:
    """Return the hidden states [R, H] that predict `rows` [R] of the flattened [B, L]."""
    inputs = now.samples.tokens.masked_fill(now.masked, model.lm_head.vocabulary.mask_id)
    padding = now.samples.roles == PADDING
    present = ~padding if padding.any() else None
    if visibility.blocks is not None:
        visibility = Visibility(now.blocks)
    hidden: Tensor = model.model(inputs, present, visibility).flatten(0, 1)
    return hidden[model.outputs_of(rows, inputs.shape[1], visibility)]
