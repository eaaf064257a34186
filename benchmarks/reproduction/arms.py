"""Objectives that every new task compares, as settings of pipeline.train."""

from __future__ import annotations

BELL = "--objective.mask_ratio_std 0.2"
RANDOM = "--objective.kind random_masking"
TURNS, SHARE = "--objective.turns 8", "--objective.random_share 0.25"
MIXED = f"{TURNS} {SHARE}"
LAST_THIRD = "{last_third}"  # the driver knows the steps of a run


def arms(stages: int) -> dict[str, str]:
    """Return the settings of each objective by its name.

    Args:
        stages: K of all chains.
    """
    puma = f"--objective.stages {stages}"
    return {
        "random": RANDOM,
        "random_bell": f"{RANDOM} {BELL}",
        "random_bell_narrow": f"{RANDOM} --objective.mask_ratio_std 0.1",
        "puma": puma,
        "puma_turns_8": f"{puma} {TURNS}",
        "puma_mixed": f"{puma} {SHARE}",
        "puma_turns_8_mixed": f"{puma} {MIXED}",
        "puma_turns_8_mixed_bell": f"{puma} {MIXED} {BELL}",
        "puma_jumps": f"{puma} --objective.stages_skipped 2",
        "random_then_puma": f"{RANDOM} {puma} {MIXED} --objective.switch_to puma"
        f" --objective.switch_step {LAST_THIRD}",
    }
