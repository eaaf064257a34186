"""Held-out loss: the same examples under the same random masks, in any run and at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.examples import ExampleDataset, Examples, stack_examples
from pipeline.engine.protocol import Engine
from pipeline.evaluation.likelihood import estimate
from pipeline.model.batch import HeadOutput, MaskedBatch
from pipeline.objectives import held_out_objective
from pipeline.objectives.seam import Layout, model_input
from pipeline.ranks import Ranks


class HeldOutLoss(NamedTuple):
    """Held-out loss, nats.

    Attributes:
        loss: mean over all examples.
        by_source: mean over the examples of each dataset that has any.
    """

    loss: float
    by_source: dict[str, float]


def held_out_loss(
    engine: Engine,
    dataset: ExampleDataset,
    examples: int,
    batch_size: int,
    layout: Layout,
    step: int,
    stopped: Callable[[], bool] = lambda: False,
    sources: Sequence[str] = (),
) -> HeldOutLoss | None:
    """Return the mean over sequences of the mean NLL (nats) at the positions that `held_out_objective` masks.

    With n ~ U{1..L_eff} random positions its expectation over masks is the bound on the negative
    log-likelihood of an answer, divided by L_eff. Every rank calls this and runs as many forwards as the
    others, as ZeRO-3 needs.

    Args:
        engine: runs the model.
        dataset: validation examples.
        examples: number of examples to use, at most.
        batch_size: sequences per forward.
        layout: shows sequences to the model.
        step: current optimizer step.
        stopped: whether to stop, asked before every forward; all ranks must agree.
        sources: names of the datasets, if the examples tell theirs.

    Returns:
        The loss; None after a stop.
    """
    ranks, objective = engine.ranks, held_out_objective(layout)
    total = torch.zeros(2, 1 + len(sources), dtype=torch.float64, device=ranks.device)
    number = torch.arange(len(sources), device=ranks.device)[:, None]  # [sources, 1]
    for batch, counted in _batches(ranks, dataset, examples, batch_size):
        if stopped():
            return None
        chains = layout.chains(batch)  # on the CPU still
        state = objective.begin(chains, torch.zeros(batch_size, 1, dtype=torch.int64), step)
        rows = int(state.masked.sum())
        chains, state = layout.chains(batch.to(ranks.device)), state.to(ranks.device)
        inputs = model_input(objective, chains, state, rows, step)
        nll = engine.evaluate(inputs).nll.double()
        weights = inputs.weights.double() * counted.double()[inputs.rows // state.masked.shape[1]]
        losses = nll * weights * batch_size  # [R]
        total[0, 0] += losses.sum()
        total[1, 0] += counted.sum()
        if sources:
            of_example = chains.examples.sources
            assert of_example is not None
            total[0, 1:] += (losses * (of_example[inputs.rows // state.masked.shape[1]] == number)).sum(dim=1)
            total[1, 1:] += (counted & (of_example == number)).sum(dim=1)
    losses, counts = (part.tolist() for part in ranks.sum(total.flatten()).view_as(total))
    means = [loss / count if count else None for loss, count in zip(losses, counts, strict=True)]
    by_source = {name: mean for name, mean in zip(sources, means[1:], strict=True) if mean is not None}
    return HeldOutLoss(losses[0] / counts[0], by_source)


def held_out_bound(
    engine: Engine,
    dataset: ExampleDataset,
    examples: int,
    batch_size: int,
    layout: Layout,
    step: int,
    draws: int,
    stopped: Callable[[], bool] = lambda: False,
) -> float | None:
    """Return the bound on the negative log-likelihood, nats a token of the answers (`likelihood.estimate`).

    It is more precise than the held-out loss, and a mean over tokens instead of sequences. The arguments are
    those of `held_out_loss`, and `draws`, an even number of masks per example. None after a stop, which up to
    `draws` more forwards precede.
    """
    ranks = engine.ranks
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    stop = False

    def evaluate(inputs: MaskedBatch) -> HeadOutput:
        nonlocal stop
        stop = stopped() or stop
        return engine.evaluate(inputs)

    for batch, counted in _batches(ranks, dataset, examples, batch_size):
        found = estimate(evaluate, layout, batch.to(ranks.device), step, draws, batch_size)
        if stop:
            return None
        total[0] += (found.nll * counted).sum()
        total[1] += (found.tokens * counted).sum()
    total = ranks.sum(total)
    return float(total[0] / total[1])


def _batches(
    ranks: Ranks, dataset: ExampleDataset, examples: int, batch_size: int
) -> Iterator[tuple[Examples, Tensor]]:
    """Yield this rank's examples, on the CPU, as many batches on each rank; and which count, [B] bool."""
    count = min(examples, len(dataset))
    for indices in ranks.batches(count, batch_size):
        ids = [i % count for i in indices]  # past the end: read again, not counted
        counted = torch.tensor([i < count for i in indices], device=ranks.device)
        yield stack_examples([dataset[i] for i in ids], ids), counted
