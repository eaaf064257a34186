"""Settings of the sampler, their checks, and their command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from pipeline.base.cli import chosen, option
from pipeline.config.checks import require
from pipeline.config.objective import POLICY_NAMES, UNSCORED, PolicyName

SCHEDULES = ("cap", "rescale")  # of remasking


@dataclass(frozen=True)
class SamplingSettings:
    """How masked positions are filled; `HELP` says what each setting does.

    Confidence, margin and entropy are those of the model's distribution p(v | xt), before temperature, top_k
    and top_p. While a block is filled (LLaDA, arXiv 2502.09992), the model still sees the others; without
    block_size, a model that was trained in blocks fills those. remasking is the schedule of ReMDM (arXiv
    2503.00307, see `schedule.fill_counts`). The noise is a hash of seed, prompt id, position and step.
    """

    policy: PolicyName = "confidence"
    tokens_per_step: int = 1
    steps: int | None = None
    threshold: float | None = None
    block_size: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    remasking: Literal["cap", "rescale"] | None = None
    eta: float | None = None
    cache: bool = True
    seed: int = 0

    def check(self, called: Callable[[str], str] = option) -> None:
        """Raise a `UserError` for a setting that is invalid, conflicts with another or has no effect.

        Args:
            called: the name of a setting in the message; by default its command-line option.
        """

        def check(name: str, condition: bool, remedy: str) -> None:
            require(condition, f"{called(name)} is {getattr(self, name)}: {remedy}")

        check("policy", self.policy in POLICY_NAMES, f"choose from {', '.join(POLICY_NAMES)}.")
        for name in ("tokens_per_step", "steps", "block_size", "top_k"):
            value = getattr(self, name)
            check(name, value is None or value >= 1, "it must be 1 or more.")
        only = self.steps is None or (self.tokens_per_step == 1 and self.threshold is None)
        others = f"{called('tokens_per_step')} and {called('threshold')}"
        check("steps", only, f"it sets what a step fills; leave out {others}.")
        if self.threshold is not None:
            is_probability = 0 < self.threshold < 1
            check("threshold", is_probability, "it is a probability, give a value between 0 and 1.")
            remedy = f"it fills by confidence, but the policy is {self.policy}: leave out one of the two."
            check("threshold", self.policy not in UNSCORED, remedy)
        remedy = "it must be 0 (the likeliest token) or more."
        check("temperature", 0 <= self.temperature < float("inf"), remedy)
        remedy = "it is a probability, give a value above 0, at most 1."
        check("top_p", self.top_p is None or 0 < self.top_p <= 1, remedy)
        for name in ("top_k", "top_p"):
            has_effect = getattr(self, name) is None or self.temperature > 0
            check(name, has_effect, "it has no effect at temperature 0: set the temperature, too.")
        check("seed", -(2**63) <= self.seed < 2**63, "give a whole number of 64 bits.")
        known = self.remasking in (None, *SCHEDULES)
        check("remasking", known, f"choose from {', '.join(SCHEDULES)}, or leave it out.")
        free = self.remasking is None or self.threshold is None
        check("remasking", free, f"its schedule fixes the number of tokens: leave out {called('threshold')}.")
        given = (self.remasking is None) == (self.eta is None)
        check("eta", given, f"{called('remasking')} is {self.remasking}; give both or neither.")
        check("eta", self.eta is None or 0 < self.eta <= 1, "give a value above 0, at most 1.")


HELP = {
    "policy": "which positions are filled first: highest confidence (probability of the likeliest token), "
    "highest margin (that minus the second likeliest's), lowest entropy, random order, or left to right",
    "tokens_per_step": "tokens filled per decoding step",
    "steps": "decoding steps per sequence (per block, if any), instead of --tokens-per-step",
    "threshold": "also fill every position with a confidence above this",
    "block_size": "fill blocks of this many tokens one after another",
    "temperature": "draw tokens from softmax(logits / temperature); 0 = take the likeliest",
    "top_k": "draw among the k likeliest tokens only",
    "top_p": "draw among the smallest set of likeliest tokens whose probabilities sum to p or more",
    "remasking": "schedule by which filled positions are masked again (ReMDM)",
    "eta": "with --remasking: highest probability (cap), or share of the highest possible one (rescale)",
    "cache": "use a key-value cache for finished blocks if the model was trained in blocks; it does not "
    "change the result",
    "seed": "seed of the noise; samples do not depend on the batch size",
}
NUMBERS = {"tokens_per_step": int, "steps": int, "block_size": int, "top_k": int, "seed": int}  # or float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one command-line option per setting."""
    group = parser.add_argument_group("sampler")
    choices = {"policy": POLICY_NAMES, "remasking": SCHEDULES}
    for field in fields(SamplingSettings):
        name, kind = field.name, dict[str, Any](type=NUMBERS.get(field.name, float))
        if name in choices:
            kind = {"choices": choices[name]}
        elif name == "cache":
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(option(name), default=field.default, help=HELP[name], **kind)


def read_options(options: argparse.Namespace) -> SamplingSettings:
    """Return the checked settings of a parsed command line.

    Raises:
        UserError: for a bad setting.
    """
    settings = chosen(SamplingSettings, options)
    settings.check()
    return settings
