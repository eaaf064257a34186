"""The decoding loop: each step fills the positions that the policy ranks highest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.data.examples import Examples
from pipeline.decoding.network import CachedNetwork, Model, ModelNetwork, Network
from pipeline.decoding.sampling import SamplingSettings
from pipeline.decoding.schedule import fill_counts
from pipeline.decoding.sequences import UNFILLED, Sequences
from pipeline.model.batch import EVERYTHING, Visibility
from pipeline.objectives.policies import POLICIES
from pipeline.objectives.seam import Scores, take_highest


@dataclass
class Decoded:
    """The result of decoding B sequences.

    Attributes:
        tokens: [B, L] int64; unfilled positions after an end-of-sequence token keep the mask token.
        order: [B, L] int64, the step at which each position was filled, counted from 0; else UNFILLED.
        steps: [B] int64, forward passes of each sequence.
    """

    tokens: Tensor
    order: Tensor
    steps: Tensor

    def keep(self, sequences: Sequences, where: Tensor, mask_id: int) -> None:
        """Store the rows of `sequences` where `where` [B] bool is True."""
        rows = sequences.rows[where]
        self.tokens[rows] = sequences.examples.tokens.masked_fill(sequences.masked, mask_id)[where]
        self.order[rows] = sequences.order[where]
        self.steps[rows] = sequences.step


@torch.no_grad()
def decode(
    model: Model,
    examples: Examples,
    masked: Tensor,
    settings: SamplingSettings,
    visibility: Visibility = EVERYTHING,
    stop: int | None = None,
    on_step: Callable[[Sequences], None] | None = None,
) -> Decoded:
    """Fill the masked positions.

    Each step runs one forward. The policy ranks the candidates by its scores, as along a chain in training;
    then tokens are drawn at the chosen positions. The choice does not depend on the drawn tokens. So at
    temperature 1 and one token per step an exact model is sampled exactly, with any policy.

    Args:
        model: the network.
        examples: tokens, roles (PADDING is not attended to) and ids, which seed the noise.
        masked: [B, L] bool; rows may have different counts.
        settings: checked settings.
        visibility: which positions each position sees (`Layout.decoding`); its blocks are filled in turn.
        stop: the end-of-sequence token; a row is finished when one is filled and nothing before it is masked.
        on_step: called after each step with the sequences in the batch.

    Raises:
        UserError: when `settings` has a block size, but the model was trained in blocks.
    """
    in_blocks = visibility.blocks is not None
    if in_blocks and settings.block_size is not None:
        raise UserError(
            f"--block-size is {settings.block_size}, but the model was trained in blocks or from left to "
            "right and must be decoded so: leave it out."
        )
    now = Sequences.start(examples, masked, visibility, settings.block_size)
    cached = settings.cache and in_blocks
    network = CachedNetwork(model, visibility, now) if cached else ModelNetwork(model, visibility)
    return decode_by(network, now, settings, stop, on_step)


@torch.no_grad()
def decode_by(
    network: Network,
    now: Sequences,
    settings: SamplingSettings,
    stop: int | None = None,
    on_step: Callable[[Sequences], None] | None = None,
) -> Decoded:
    """Fill the masked positions of `now`, from its first step, with any network; see `decode`."""
    result = Decoded(now.examples.tokens.clone(), now.order, torch.zeros_like(now.rows))
    while True:
        candidates = now.candidates(stop)
        alive = candidates.any(dim=1)
        result.keep(now, ~alive, network.mask_id)
        if network.is_done(alive):
            return result
        if not network.drops_rows:
            alive = torch.ones_like(alive)
        if not alive.all():
            network.keep(alive)
        now, candidates = now.kept(alive), candidates[alive]
        _step(network, now, candidates, settings)
        if on_step is not None:
            on_step(now)


def _step(network: Network, now: Sequences, candidates: Tensor, settings: SamplingSettings) -> None:
    """Run one forward on `now`, fill the highest-ranked candidates [B, L] and remask positions."""
    policy = POLICIES[settings.policy]
    rows = candidates.flatten().nonzero().squeeze(1)  # [R]
    network.forward(now, rows)
    ranking = policy.initial(settings.seed, now.examples)
    if policy.by_scores is not None:
        scores = Scores.of(network.output(policy.needs), rows, candidates)
        ranking = policy.by_scores(scores)
    current = torch.where(candidates, now.blocks, 0).amax(dim=1, keepdim=True)
    count, again = fill_counts(settings, now, now.answer & (now.blocks == current))
    filled = take_highest(candidates, ranking, count)
    if settings.threshold is not None:  # the settings require a policy with scores
        filled |= candidates & (scores.confidence > settings.threshold)
    places = filled.flatten().nonzero().squeeze(1)  # [F]
    row, position = places // filled.shape[1], places % filled.shape[1]
    counters = (now.examples.ids[row], position, torch.full_like(row, now.step))
    now.examples.tokens[row, position] = network.draw(filled.flatten()[rows], settings, counters)
    now.order = now.order.masked_fill(filled, now.step).masked_fill(again, UNFILLED)
    now.masked = (now.masked & ~filled) | again
    now.step += 1
    unfinished = (now.masked & now.answer & (now.blocks == current)).any(dim=1)
    now.began = torch.where(unfinished, now.began, now.step)
