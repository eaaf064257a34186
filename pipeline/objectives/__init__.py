"""Ways of masking, on one seam (base.py); this is the one place that knows them by name."""

from __future__ import annotations

from pipeline.config import Config, ObjectiveConfig
from pipeline.objectives.autoregressive import Autoregressive
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole
from pipeline.objectives.mixture import Mixture
from pipeline.objectives.objective import Objective, ObjectiveSchedule
from pipeline.objectives.policies import POLICIES
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.random_masking import RandomMasking
from pipeline.objectives.stages import StageSchedule


def build(config: Config, mask_id: int, has_padding: bool) -> ObjectiveSchedule:
    """Return the configured objective of each step.

    Args:
        config: the run.
        mask_id: the mask token M.
        has_padding: whether the model must be told of padding positions.
    """
    settings = config.objective
    parts = [(1, _objective(settings.kind, config, mask_id, has_padding))]
    if settings.switch_to is not None and settings.switch_step is not None:
        parts.append((settings.switch_step, _objective(settings.switch_to, config, mask_id, has_padding)))
    longest = 2 if settings.complementary else 1
    if "puma" in settings.kinds:
        longest = max(longest, stage_schedule(settings)(config.train.steps))
    return ObjectiveSchedule(longest, *parts)


def _objective(kind: str, config: Config, mask_id: int, has_padding: bool) -> Objective:
    settings, seed = config.objective, config.train.seed
    first_given = config.model.prediction == "shifted"
    if kind == "autoregressive":
        return Autoregressive(LeftToRight(mask_id, has_padding, first_given))
    masked_from = settings.switch_step if settings.kind == "autoregressive" else None
    annealing = (settings.attention_annealing_steps, masked_from or 1)
    layout = Whole(mask_id, has_padding, first_given, *annealing, seed)
    if settings.block_size is not None:
        layout = Blocks(mask_id, has_padding, first_given, size=settings.block_size)
    strata = config.train.global_batch_size if settings.stratified else None
    random = RandomMasking(seed, layout, settings.mask_count, strata, settings.complementary)
    if kind == "random_masking":
        return random
    policy = POLICIES[settings.policy]
    chains = ProgressiveUnmasking(seed, layout, stage_schedule(settings), policy, settings.threshold)
    return Mixture(chains, random, settings.random_share) if settings.random_share else chains


def stages_at(settings: ObjectiveConfig, step: int) -> int | None:
    """Return K at `step` (1 is the first); nothing where the objective has no stages."""
    switched = settings.switch_step is not None and step >= settings.switch_step
    kind = settings.switch_to if switched else settings.kind
    return stage_schedule(settings)(step) if kind == "puma" else None


def stage_schedule(settings: ObjectiveConfig) -> StageSchedule:
    """Return K as a function of the step."""
    return StageSchedule(
        settings.stages,
        settings.stages_increment,
        settings.stages_first_increase or 1,
        settings.stages_interval or 1,
        settings.stages_maximum,
    )
