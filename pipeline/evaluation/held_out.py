"""Held-out loss: the same samples under the same random masks, whatever the objective, run or world size."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.data.batch import SampleDataset, stack_samples
from pipeline.objectives.base import Objective, model_input
from pipeline.runtime import Engine


def held_out_loss(
    engine: Engine,
    dataset: SampleDataset,
    samples: int,
    batch_size: int,
    objective: Objective,
    step: int,
    stopped: Callable[[], bool] = lambda: False,
) -> float | None:
    """Return the mean over sequences of the mean NLL (nats) at the positions that `objective` masks.

    With n ~ U{1..L_eff} random positions its expectation over masks is the bound on the negative
    log-likelihood of an answer, divided by L_eff. Every rank calls this and runs as many forwards as the
    others, as ZeRO-3 needs.

    Args:
        engine: what runs the model.
        dataset: validation samples.
        samples: how many of them are used, at most.
        batch_size: sequences a forward.
        objective: what masks them, one input for each sample (`Objective.held_out`).
        step: the optimizer step that the model has come to.
        stopped: asked before every forward whether to give up; all ranks must answer alike.

    Returns:
        The loss; nothing when it was given up.
    """
    launch, count = engine.launch, min(samples, len(dataset))
    total = torch.zeros(2, dtype=torch.float64, device=launch.device)
    for start in range(0, count, batch_size * launch.data_size):
        if stopped():
            return None
        first = start + launch.data_rank * batch_size
        indices = range(first, first + batch_size)
        counted = torch.tensor([i < count for i in indices], device=launch.device)
        ids = [i % count for i in indices]  # past the end: read again, not counted
        batch = stack_samples([dataset[i] for i in ids], ids)
        state = objective.begin(batch, torch.zeros(batch_size, 1, dtype=torch.int64), step)
        rows = int(state.masked.sum())  # on the CPU still
        batch, state = batch.to(launch.device), state.to(launch.device)
        inputs = model_input(objective, batch, state, rows, step)
        nll = engine.evaluate(inputs).nll.double()
        weights = inputs.weights.double() * counted.double()[inputs.rows // state.masked.shape[1]]
        total[0] += (nll * weights).sum() * batch_size
        total[1] += counted.sum()
    total = engine.sum_over_ranks(total)
    return float(total[0] / total[1])
