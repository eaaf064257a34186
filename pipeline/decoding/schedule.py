"""How many positions a decoding step fills, and which filled ones it remasks."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.decoding.sampling import SamplingSettings
from pipeline.decoding.sequences import Sequences
from pipeline.objectives import noise
from pipeline.objectives.seam import positions_like


def fill_counts(settings: SamplingSettings, now: Sequences, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many candidates the step fills, [B] int64, and which positions it remasks, [B, L] bool.

    With a threshold, the count is a minimum. With remasking, each of the alpha L filled positions is masked
    again with probability sigma, and as many more are filled, so that alpha' L are filled after the step for
    any sigma (ReMDM, arXiv 2503.00307, equation for sigma_max; alpha_t is the filled share before the step,
    alpha_s that after it):

        sigma_max = min(1, (1 - alpha') / alpha)
        cap:      sigma = min(eta, sigma_max)
        rescale:  sigma = eta sigma_max

    ReMDM draws both numbers from a binomial distribution. Here the schedule fixes the number of filled
    positions, so remasking adds no steps. The last step remasks nothing, since alpha' = 1.

    Args:
        settings: settings of the sampler.
        now: the sequences.
        block: [B, L] bool, the answer positions of each sequence's current block.
    """
    length = block.sum(dim=1)
    filled = block & ~now.masked
    count, none = filled.sum(dim=1), torch.zeros_like(block)
    place = now.step - now.began + 1  # steps of this block, including this one
    after = length * place // settings.steps if settings.steps else settings.tokens_per_step * place
    after = torch.minimum(after, length)
    if settings.remasking is None:
        if settings.threshold is not None:  # earlier steps may have filled more than the schedule
            return torch.full_like(count, settings.tokens_per_step), none
        return (after - count).clamp(min=1), none
    eta = settings.eta or 0.0
    limit = ((length - after) / count.clamp(min=1)).clamp(max=1.0)  # sigma_max
    sigma = limit.clamp(max=eta) if settings.remasking == "cap" else eta * limit
    ids, positions = now.examples.ids[:, None], positions_like(block)
    drawn = noise.uniform(settings.seed, noise.REMASKING, ids, positions, torch.full_like(ids, now.step))
    again = filled & (drawn < sigma[:, None])
    return after - count + again.sum(dim=1), again
