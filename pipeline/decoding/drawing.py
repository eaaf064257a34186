"""Which token is written: the likeliest, or one drawn by temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.decoding.settings import SamplingSettings
from pipeline.model.masked_head import CHUNK_LOGITS, MaskedHead
from pipeline.objectives import noise


def draw_tokens(
    head: MaskedHead, hidden: Tensor, settings: SamplingSettings, counters: tuple[Tensor, ...]
) -> Tensor:
    """Return a token [R] int64 for each row, the logits of a chunk of rows at a time.

    Args:
        head: the output layer.
        hidden: [R, H].
        settings: temperature, top_k, top_p and seed.
        counters: [R] int64 each, by which the noise tells the rows apart.
    """
    chunk = max(1, CHUNK_LOGITS // len(head.weight))
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        logits = head.logits(hidden[part])  # [C, V] float32
        if settings.temperature > 0:
            below = logits.double() - logits.amax(dim=-1, keepdim=True)  # no temperature overflows 0
            logits = restricted(below / settings.temperature, settings.top_k, settings.top_p)
            logits += gumbel(settings.seed, [counter[part] for counter in counters], logits.shape[1])
        tokens[part] = logits.argmax(dim=-1)
    return tokens


def restricted(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return logits [R, V] with -inf for the tokens that top-k, and after it top-p, leave out.

    Top-p (Holtzman et al., arXiv 1904.09751) keeps the fewest tokens whose probabilities, likeliest first,
    come to p or more. Tokens as likely as the last one kept are kept, too.
    """
    if top_k is not None and top_k < logits.shape[1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]  # [R, 1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p is not None and top_p < 1:
        falling = logits.softmax(dim=-1).sort(dim=-1, descending=True).values
        before = falling.cumsum(dim=-1) - falling  # what comes ahead of each
        count = (before < top_p).sum(dim=-1, keepdim=True)  # [R, 1], at least 1
        lowest = logits.sort(dim=-1, descending=True).values.gather(1, count - 1)
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    return logits


def gumbel(seed: int, counters: list[Tensor], tokens: int) -> Tensor:
    """Return standard Gumbel noise [R, V] float64: argmax(z + noise) is a draw from softmax(z).

    In float32 the uniform numbers stop at 1 - 2^-24, which cuts the noise off at 16.6: rare tokens then
    hardly ever win, as at a lower temperature (arXiv 2409.02908, section 4). Here it goes to 36.7.

    Args:
        seed: of the noise.
        counters: [R] int64 each.
        tokens: V.
    """
    vocabulary = torch.arange(tokens, device=counters[0].device)
    rows = [counter[:, None] for counter in counters]
    return -torch.log(-torch.log(noise.uniform(seed, noise.SAMPLED_TOKEN, *rows, vocabulary)))
