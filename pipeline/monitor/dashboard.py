"""The custom-scalars page of TensorBoard: the charts to look at, in order."""

from __future__ import annotations

import re
from collections.abc import Iterable

Layout = dict[str, dict[str, list[str | list[str]]]]  # as SummaryWriter.add_custom_scalars takes it

# Category -> chart -> tags, which TensorBoard reads as regular expressions.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "1 Does it learn?": {
        "loss": [r"train/loss$", r"held_out/.*"],
        "loss by mask ratio": [r"loss_by_mask_ratio/.*"],
        "loss by stage": [r"loss_by_stage/.*"],
        "loss by source": [r"loss_by_source/.*"],
        "held-out loss by source": [r"held_out_by_source/.*"],
        "held-out loss by phase": [r"held_out_by_phase/.*"],
        "accuracy on tasks": [r"evaluation/.*/accuracy$"],
        "perplexity of samples": [r"evaluation/.*/(reference_)?perplexity$"],
        "entropy of samples": [r"evaluation/.*/(reference_)?entropy$"],
    },
    "2 Is it stable?": {
        "gradient norm": [r"train/gradient_norm$"],
        "parameter norm": [r"train/parameter_norm$"],
        "learning rate": [r"train/learning_rate$"],
        "skipped steps": [r"train/skipped_steps$"],
    },
    "3 How do the chains walk?": {
        "share of masked positions": [r"train/masked_fraction$"],
        "K and the mean stage": [r"chains/stages$", r"train/mean_stage$"],
        "steps of a chain": [r"chains/mean_length$"],
        "positions revealed a step": [r"chains/reveals_per_step$"],
        "share revealed by the threshold": [r"chains/threshold_share$"],
        "epochs": [r"progress/epochs$"],
    },
    "4 Does it know what it knows?": {
        "confidence and accuracy": [r"calibration/(confidence|accuracy)$"],
        "accuracy by confidence": [r"accuracy_by_confidence/.*"],
        "expected calibration error": [r"calibration/error$"],
    },
    "5 Is it fast?": {
        "tokens a second": [r"train/tokens_per_second$"],
        "TFLOP/s a rank": [r"speed/tflops$"],
        "MFU": [r"speed/mfu$"],
        "share of the time spent waiting for data": [r"speed/data_wait_share$"],
        "seconds spent on saving and evaluating": [r"time/(checkpoint_stall|evaluation)$"],
        "memory, GiB": [r"memory/.*"],
        "slowest rank and median": [r"ranks/.*_(slowest|median)$"],
    },
}


def tag_of(name: str) -> str:
    """Return the TensorBoard tag of a metric of metrics.jsonl."""
    return name if "/" in name else f"train/{name}"


def layout_of(tags: Iterable[str]) -> Layout:
    """Return TensorBoard's layout, without the charts that none of the tags is in."""
    present = list(tags)
    charts: Layout = {
        category: {
            title: ["Multiline", list(patterns)]
            for title, patterns in charts.items()
            if any(re.match(pattern, tag) for pattern in patterns for tag in present)
        }
        for category, charts in LAYOUT.items()
    }
    return {category: found for category, found in charts.items() if found}
