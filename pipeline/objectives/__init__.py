"""The ways of masking. Only this module knows them by name; the seam is `Objective` in seam.py."""

from __future__ import annotations

from pipeline.config import Config, ObjectiveConfig
from pipeline.objectives.autoregressive import Autoregressive
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole
from pipeline.objectives.mask_ratio import MaskRatio
from pipeline.objectives.mixture import Mixture
from pipeline.objectives.policies import POLICIES
from pipeline.objectives.progressive import ProgressiveUnmasking
from pipeline.objectives.random_masking import RandomMasking
from pipeline.objectives.seam import Layout, Objective, ObjectiveSchedule
from pipeline.objectives.stages import StageSchedule

HELD_OUT_SEED = 0


def build(config: Config, mask_id: int, has_padding: bool) -> ObjectiveSchedule:
    """Return the configured objective of each step.

    Args:
        config: the run.
        mask_id: the mask token M.
        has_padding: whether the model needs a padding mask.
    """
    settings = config.objective
    first_steps = (1,) if settings.switch_step is None else (1, settings.switch_step)
    parts = [(step, _objective(settings.kind_at(step), config, mask_id, has_padding)) for step in first_steps]
    longest = 2 if settings.complementary else 1
    if "puma" in settings.kinds:
        longest = max(longest, stage_schedule(settings)(config.train.steps))
    return ObjectiveSchedule(longest, *parts)


def decoding_layout(config: Config, mask_id: int, step: int) -> Layout:
    """Return the layout in which a model trained for `step` steps fills sequences.

    It always has a padding mask: prompts of a batch differ in length, whatever the training data were.
    """
    return build(config, mask_id, has_padding=True).at(max(1, step)).layout


def held_out_objective(layout: Layout) -> Objective:
    """Return the objective of the held-out loss: its masks depend on the example alone, in any run and step.

    With causal attention its loss is the exact negative log-likelihood divided by L_eff.
    """
    return Autoregressive(layout) if layout.attention == "causal" else RandomMasking(HELD_OUT_SEED, layout)


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
    ratios = MaskRatio(
        settings.mask_ratio_minimum,
        settings.mask_ratio_maximum,
        settings.mask_ratio_mean,
        settings.mask_ratio_std,
    )
    random = RandomMasking(
        seed,
        layout,
        settings.mask_count,
        strata,
        settings.complementary,
        ratios,
        settings.mask_ratio_weighted,
    )
    if kind == "random_masking":
        return random
    policy = POLICIES[settings.policy]
    chains = ProgressiveUnmasking(
        seed, layout, stage_schedule(settings), policy, settings.threshold, ratios, settings.stages_skipped,
        settings.reveal_pool,
    )  # fmt: skip
    return Mixture(chains, random, settings.random_share) if settings.random_share else chains


def stages_at(settings: ObjectiveConfig, step: int) -> int | None:
    """Return K at `step` (1 is the first); None where the objective has no stages."""
    return stage_schedule(settings)(step) if settings.kind_at(step) == "puma" else None


def stage_schedule(settings: ObjectiveConfig) -> StageSchedule:
    """Return K as a function of the step."""
    return StageSchedule(
        settings.stages,
        settings.stages_increment,
        settings.stages_first_increase or 1,
        settings.stages_interval or 1,
        settings.stages_maximum,
    )
