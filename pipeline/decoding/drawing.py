"""Draw tokens: greedily, or with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.decoding.sampling import SamplingSettings
from pipeline.model.batch import HeadOutput, Vocabulary
from pipeline.model.masked_head import chunk_rows, memory_of
from pipeline.objectives import noise

UNITS = 2**52  # of probability, in sums of whole numbers
NOISY = 2**24  # float64 logits with noise at once: 128 MiB


class Head(Protocol):
    """What decoding uses of an output layer, such as `MaskedHead`.

    Attributes:
        weight: [V, H].
        vocabulary: the vocabulary.
    """

    weight: Tensor
    vocabulary: Vocabulary

    def scores(self, hidden: Tensor, needs: tuple[str, ...]) -> HeadOutput:
        """Return the scores of the predictions at hidden [R, H]; the losses are ignored."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [R, V] float32 for hidden [R, H]; -inf at tokens never predicted."""


def draw_tokens(
    head: Head, hidden: Tensor, settings: SamplingSettings, counters: tuple[Tensor, ...]
) -> Tensor:
    """Draw a token for each row, [R] int64; compute logits for a chunk of rows at a time.

    Args:
        head: the output layer.
        hidden: [R, H].
        settings: temperature, top_k, top_p and seed.
        counters: [R] int64 each, the counters of the noise.
    """
    chunk = chunk_rows(len(head.weight), memory_of(hidden.device))
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        of_part = [counter[part] for counter in counters]
        tokens[part] = draw_from(head.logits(hidden[part]), settings, of_part)
    return tokens


def draw_from(logits: Tensor, settings: SamplingSettings, counters: Sequence[Tensor]) -> Tensor:
    """Draw a token for each row of logits [R, V] float32, [R] int64; see `draw_tokens`."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    rows, tokens = max(1, NOISY // logits.shape[1]), []
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows]
        below = part.double() - part.amax(dim=-1, keepdim=True)  # max 0: no temperature overflows it
        noisy = restricted(below / settings.temperature, settings.top_k, settings.top_p)
        of_part = [counter[start : start + rows] for counter in counters]
        noisy += gumbel(settings.seed, of_part, logits.shape[1])
        tokens.append(noisy.argmax(dim=-1))
    return torch.cat(tokens) if tokens else logits.new_empty(0, dtype=torch.int64)


def restricted(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set the logits [R, V] of tokens excluded by top-k, then by top-p, to -inf.

    Top-p (Holtzman et al., arXiv 1904.09751) keeps the smallest set of likeliest tokens whose probabilities
    sum to p or more. Ties with the last kept token are kept, too.
    """
    if top_k is not None and top_k < logits.shape[1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]  # [R, 1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p is not None and top_p < 1:
        falling = logits.softmax(dim=-1).sort(dim=-1, descending=True).values
        # In whole units: torch has no deterministic sum of this kind over floats on a GPU.
        falling = (falling.double() * UNITS).long()
        before = falling.cumsum(dim=-1) - falling  # probability of all likelier tokens
        count = (before < top_p * UNITS).sum(dim=-1, keepdim=True)  # [R, 1], at least 1
        lowest = logits.sort(dim=-1, descending=True).values.gather(1, count - 1)
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    return logits


def gumbel(seed: int, counters: list[Tensor], tokens: int) -> Tensor:
    """Return standard Gumbel noise [R, V] float64: argmax(z + noise) is a draw from softmax(z).

    In float32 uniform numbers end at 1 - 2^-24, which truncates the noise at 16.6. Rare tokens are then drawn
    too seldom, as at a lower temperature (arXiv 2409.02908, section 4). Float64 truncates at 36.7.

    Args:
        seed: seed of the noise.
        counters: [R] int64 each.
        tokens: V.
    """
    vocabulary = torch.arange(tokens, device=counters[0].device)
    rows = [counter[:, None] for counter in counters]
    return -torch.log(-torch.log(noise.uniform(seed, noise.SAMPLED_TOKEN, *rows, vocabulary)))
