"""Groups of slots over small pairs, walked without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.chains.slots import SlotGroup
from pipeline.chains.stream import SlotStream
from pipeline.config import Config, ModelConfig, ObjectiveConfig, TrainConfig
from pipeline.model.batch import HeadOutput, MaskedBatch
from pipeline.objectives import build
from support.synthetic import Pairs

SEED, SIZE, MASK, WIDTH = 3, 29, 4, 8


def group_of(
    slots: Sequence[int],
    total: int,
    objective: ObjectiveConfig,
    prediction: str = "same",
    workers: int = 0,
    first_step: int = 1,
    interval: int = 1,
    compiled: bool = False,
) -> SlotGroup:
    """Return a group of `slots` of `total` over 29 synthetic pairs, trained every `interval` steps."""
    config = Config(
        "unused",
        model=ModelConfig(prediction=prediction),  # type: ignore[arg-type]
        objective=objective,
        train=TrainConfig(seed=SEED, global_batch_size=total),
    )
    stream = SlotStream(Pairs(SIZE), total, SEED, workers)
    objectives = build(config, MASK, True)
    return SlotGroup(slots, stream, objectives, torch.device("cpu"), first_step, interval, compiled)


def output(group: SlotGroup, batch: MaskedBatch) -> HeadOutput:
    """Return scores that depend on the example and the position alone, as a model's might."""
    example, position = group.examples.ids[batch.rows // WIDTH], batch.rows % WIDTH
    score = ((example * 7919 + position * 104729 + 13) % 101).float() / 101
    return HeadOutput(score.sum(), score, score, score**2, 1 - score)


def step(group: SlotGroup, number: int) -> MaskedBatch:
    """Run training step `number` without a model."""
    batch = group.inputs(number)
    group.advance(batch, output(group, batch), number)
    return batch
