"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pipeline.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of `step` (1 is the first) in a run of `steps` steps.

    Linear warm-up reaches `peak` at step ``warmup_steps``. Then cosine decays along half a cosine to
    ``final_ratio x peak`` at the last step. wsd stays at the peak, and decays linearly to that value over the
    last ``decay_steps`` steps (Hu et al. 2024, MiniCPM, arXiv 2404.06395).
    """
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, steps - schedule.warmup_steps)
        progress = min(1.0, (step - schedule.warmup_steps) / span)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = min(1.0, max(0, steps - step) / max(1, schedule.decay_steps)) if schedule.decay_steps else 1.0
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * share)
