"""How many positions a step fills, and which filled ones it masks again."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.decoding.sequences import Sequences
from pipeline.decoding.settings import SamplingSettings
from pipeline.objectives import noise
from pipeline.objectives.objective import positions_like


def fill_counts(settings: SamplingSettings, now: Sequences, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many candidates the step fills at least, [B] int64, and what it masks again, [B, L] bool.

    With remasking, of alpha L filled positions each is masked again with the probability sigma, and as many
    more are filled, so that there are alpha' L filled ones after the step whatever sigma is (ReMDM, arXiv
    2503.00307; its equation for sigma_max, with the filled share for alpha_t and the next one for alpha_s):

        sigma_max = min(1, (1 - alpha') / alpha)
        cap:      sigma = min(eta, sigma_max)
        rescale:  sigma = eta sigma_max

    ReMDM draws both numbers from a binomial distribution; here the number of filled positions is that of the
    schedule, so a sequence takes as many steps as without. The last step masks nothing, since alpha' = 1.

    Args:
        settings: of the sampler.
        now: the sequences.
        block: [B, L] bool, the positions of each sequence's current block that were to be filled.
    """
    length = block.sum(dim=1)
    filled = block & ~now.masked
    count, none = filled.sum(dim=1), torch.zeros_like(block)
    place = now.step - now.began + 1  # steps of this block, with this one
    after = length * place // settings.steps if settings.steps else settings.tokens_per_step * place
    after = torch.minimum(after, length)
    if settings.remasking is None:
        if settings.threshold is not None:  # may be ahead of the schedule
            return torch.full_like(count, settings.tokens_per_step), none
        return (after - count).clamp(min=1), none
    eta = settings.eta or 0.0
    limit = ((length - after) / count.clamp(min=1)).clamp(max=1.0)  # sigma_max
    sigma = limit.clamp(max=eta) if settings.remasking == "cap" else eta * limit
    ids, positions = now.examples.ids[:, None], positions_like(block)
    drawn = noise.uniform(settings.seed, noise.REMASKING, ids, positions, torch.full_like(ids, now.step))
    again = filled & (drawn < sigma[:, None])
    return after - count + again.sum(dim=1), again
