"""Held-out loss: the same samples under the same random masks, whatever the objective, run or world size."""

from __future__ import annotations

import torch

from pipeline.data.batch import PADDING, SampleDataset, stack_samples
from pipeline.model.batch import masked_batch
from pipeline.objectives.random_masking import random_masks
from pipeline.runtime import Engine

MASK_SEED = 0


def held_out_loss(
    engine: Engine, dataset: SampleDataset, samples: int, batch_size: int, mask_id: int, has_padding: bool
) -> float:
    """Return the mean over sequences of the mean NLL (nats) at n ~ U{1..L_eff} random masked positions.

    Its expectation over masks is the bound on the negative log-likelihood of an answer, divided by L_eff.
    Every rank calls this and runs as many forwards as the others, as ZeRO-3 needs.

    Args:
        engine: what runs the model.
        dataset: validation samples.
        samples: how many of them are used, at most.
        batch_size: sequences a forward.
        mask_id: the mask token.
        has_padding: whether the model must be told of padding positions.
    """
    launch, count = engine.launch, min(samples, len(dataset))
    total = torch.zeros(2, dtype=torch.float64, device=launch.device)
    for start in range(0, count, batch_size * launch.data_size):
        first = start + launch.data_rank * batch_size
        indices = range(first, first + batch_size)
        counted = torch.tensor([i < count for i in indices], device=launch.device)
        ids = [i % count for i in indices]  # past the end: read again, not counted
        batch = stack_samples([dataset[i] for i in ids], ids)
        masked = random_masks(MASK_SEED, batch)
        rows = int(masked.sum())
        batch, masked = batch.to(launch.device), masked.to(launch.device)
        padding = batch.roles == PADDING if has_padding else None
        inputs = masked_batch(batch.tokens, masked, rows, mask_id, padding)
        nll = engine.evaluate(inputs).nll.double()
        weights = inputs.weights.double() * counted.double()[inputs.rows // masked.shape[1]]
        total[0] += (nll * weights).sum() * batch_size
        total[1] += counted.sum()
    total = engine.sum_over_ranks(total)
    return float(total[0] / total[1])
