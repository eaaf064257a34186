"""The custom-scalars page of TensorBoard: the charts to look at, in order."""

from __future__ import annotations

import re
from collections.abc import Iterable

Layout = dict[str, dict[str, list[str | list[str]]]]

# Category -> chart -> tags, which TensorBoard reads as regular expressions.
LAYOUT: Layout = {
    "1 Does it learn?": {
        "loss": ["Multiline", [r"train/loss$", r"held_out/.*"]],
        "loss by mask ratio": ["Multiline", [r"loss_by_mask_ratio/.*"]],
        "loss by stage": ["Multiline", [r"loss_by_stage/.*"]],
        "loss by source": ["Multiline", [r"loss_by_source/.*"]],
        "held-out loss by source": ["Multiline", [r"held_out_by_source/.*"]],
        "held-out loss by phase": ["Multiline", [r"held_out_by_phase/.*"]],
        "accuracy on tasks": ["Multiline", [r"evaluation/.*/accuracy$"]],
        "perplexity of samples": ["Multiline", [r"evaluation/.*/(reference_)?perplexity$"]],
        "entropy of samples": ["Multiline", [r"evaluation/.*/(reference_)?entropy$"]],
    },
    "2 Is it stable?": {
        "gradient norm": ["Multiline", [r"train/gradient_norm$"]],
        "parameter norm": ["Multiline", [r"train/parameter_norm$"]],
        "learning rate": ["Multiline", [r"train/learning_rate$"]],
        "skipped steps": ["Multiline", [r"train/skipped_steps$"]],
    },
    "3 How do the chains walk?": {
        "share of masked positions": ["Multiline", [r"train/masked_fraction$"]],
        "K and the mean stage": ["Multiline", [r"chains/stages$", r"train/mean_stage$"]],
        "steps of a chain": ["Multiline", [r"chains/mean_length$"]],
        "positions revealed a step": ["Multiline", [r"chains/reveals_per_step$"]],
        "share revealed by the threshold": ["Multiline", [r"chains/threshold_share$"]],
        "epochs": ["Multiline", [r"progress/epochs$"]],
    },
    "4 Does it know what it knows?": {
        "confidence and accuracy": ["Multiline", [r"calibration/(confidence|accuracy)$"]],
        "accuracy by confidence": ["Multiline", [r"accuracy_by_confidence/.*"]],
        "expected calibration error": ["Multiline", [r"calibration/error$"]],
    },
    "5 Is it fast?": {
        "tokens a second": ["Multiline", [r"train/tokens_per_second$"]],
        "TFLOP/s a rank": ["Multiline", [r"speed/tflops$"]],
        "MFU": ["Multiline", [r"speed/mfu$"]],
        "share of the time spent waiting for data": ["Multiline", [r"speed/data_wait_share$"]],
        "seconds spent on saving and evaluating": ["Multiline", [r"time/(checkpoint_stall|evaluation)$"]],
        "memory, GiB": ["Multiline", [r"memory/.*"]],
        "slowest rank and median": ["Multiline", [r"ranks/.*_(slowest|median)$"]],
    },
}


def tag_of(name: str) -> str:
    """Return the TensorBoard tag of a metric of metrics.jsonl."""
    return name if "/" in name else f"train/{name}"


def layout_of(tags: Iterable[str]) -> Layout:
    """Return the layout without the charts that none of the tags is in."""
    present = list(tags)
    charts = {
        category: {
            title: [kind, patterns]
            for title, (kind, patterns) in charts.items()
            if any(re.match(pattern, tag) for pattern in patterns for tag in present)
        }
        for category, charts in LAYOUT.items()
    }
    return {category: found for category, found in charts.items() if found}
