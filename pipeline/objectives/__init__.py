"""Ways of masking, on one seam (base.py); `build` is the one place that knows them by name."""

from __future__ import annotations

from pipeline.config import ObjectiveConfig
from pipeline.objectives.base import Objective, ObjectiveSchedule
from pipeline.objectives.layouts import Whole
from pipeline.objectives.policies import POLICIES
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.random_masking import RandomMasking
from pipeline.objectives.stages import StageSchedule


def build(
    config: ObjectiveConfig, seed: int, slots: int, mask_id: int, has_padding: bool
) -> ObjectiveSchedule:
    """Return the configured objective of each step.

    Args:
        config: the settings.
        seed: seed of every mask.
        slots: sequences of a global batch.
        mask_id: the mask token M.
        has_padding: whether the model must be told of padding positions.
    """
    layout = Whole(mask_id, has_padding)
    objective: Objective
    if config.kind == "puma":
        policy = POLICIES[config.policy]
        objective = ProgressiveUnmasking(seed, layout, StageSchedule(config.stages), policy, config.threshold)
    else:
        objective = RandomMasking(seed, layout)
    return ObjectiveSchedule((1, objective))
