"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pipeline.config import ScheduleConfig


def learning_rate(
    step: int, steps: int, peak: float, schedule: ScheduleConfig, branched_at: int = 0
) -> float:
    """Return the learning rate of `step` (1 is the first) in a run of `steps` steps.

    A run that branched off another one at step `branched_at` climbs from 0 to this rate over
    ``rewarm_steps``.
    """
    rate = _scheduled(step, steps, peak, schedule)
    since = step - branched_at
    return rate * since / schedule.rewarm_steps if since < schedule.rewarm_steps else rate


def _scheduled(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the rate of `step`, apart from a climb after a branch.

    Linear warm-up reaches `peak` at step ``warmup_steps``. Then

    - cosine decays along half a cosine to ``final_ratio x peak`` at the last step;
    - wsd stays at the peak (Hu et al. 2024, MiniCPM, arXiv 2404.06395);
    - inverse_sqrt falls as ``peak x sqrt(warmup_steps / step)`` (Vaswani et al. 2017, arXiv 1706.03762).

    wsd and inverse_sqrt decay to ``final_ratio x peak`` over the last ``decay_steps`` steps. Of the shapes,
    1-sqrt is that of Hägele et al. 2024 (arXiv 2405.18392).
    """
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    level = 1.0
    if schedule.kind == "cosine":
        span = max(1, steps - schedule.warmup_steps)
        progress = min(1.0, (step - schedule.warmup_steps) / span)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = _share_of_decay(step, steps, schedule)
        if schedule.kind == "inverse_sqrt":
            level = math.sqrt(schedule.warmup_steps / step)
    return peak * (schedule.final_ratio + (level - schedule.final_ratio) * share)


def _share_of_decay(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Return the share of the final decay that is still to come at `step`, from 1 to 0."""
    if schedule.decay_steps == 0:
        return 1.0
    remaining = min(1.0, max(0, steps - step) / schedule.decay_steps)
    if schedule.decay_shape == "linear":
        return remaining
    if schedule.decay_shape == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    return 1 - math.sqrt(1 - remaining)
