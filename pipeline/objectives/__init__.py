"""Ways of masking, on one seam (base.py); `build` is the one place that knows them by name."""

from __future__ import annotations

from pipeline.config import ObjectiveConfig
from pipeline.objectives.base import Objective
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.random_masking import RandomMasking


def build(config: ObjectiveConfig, seed: int) -> Objective:
    """Return the configured objective."""
    if config.kind == "puma":
        return ProgressiveUnmasking(seed, config.stages, config.threshold)
    return RandomMasking(seed)
