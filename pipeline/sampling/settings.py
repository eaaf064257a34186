"""Settings of the sampler, with their checks, and the same settings as options of a command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Literal

from pipeline.config.checks import require
from pipeline.objectives.policies import POLICIES


@dataclass(frozen=True)
class SamplingSettings:
    """How masked positions are filled.

    Attributes:
        policy: which positions are filled first, as `ObjectiveConfig.policy`. The scores are those of the
            model's own distribution p(v | xt), whatever temperature, top_k and top_p make of it.
        tokens_per_step: positions filled at a step in each sequence.
        threshold: also fill every position with a confidence above this; none = tokens_per_step alone.
        temperature: tokens are drawn from softmax(logits / temperature); 0 = the likeliest token.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest tokens whose probabilities, likeliest first, come to p or more.
        seed: of the noise, which is a hash of seed, prompt number, position and step: what is drawn for a
            prompt does not depend on the batch that it is in.
    """

    policy: Literal["confidence", "margin", "entropy", "random", "left_to_right"] = "confidence"
    tokens_per_step: int = 1
    threshold: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work with the others, or has no effect."""
        policies = ", ".join(POLICIES)
        self._require("policy", self.policy in POLICIES, f"choose from {policies}.")
        self._require("tokens_per_step", self.tokens_per_step >= 1, "it must be 1 or more.")
        if self.threshold is not None:
            is_probability = 0 < self.threshold < 1
            self._require("threshold", is_probability, "it is a probability, give a value between 0 and 1.")
            remedy = f"it fills by confidence, against the policy {self.policy}: leave out one of the two."
            self._require("threshold", POLICIES[self.policy].by_scores is not None, remedy)
        remedy = "it must be 0 (the likeliest token) or more."
        self._require("temperature", 0 <= self.temperature < float("inf"), remedy)
        self._require("top_k", self.top_k is None or self.top_k >= 1, "it must be 1 or more.")
        remedy = "it is a probability, give a value above 0, at most 1."
        self._require("top_p", self.top_p is None or 0 < self.top_p <= 1, remedy)
        for name in ("top_k", "top_p"):
            has_effect = getattr(self, name) is None or self.temperature > 0
            self._require(name, has_effect, "it has no effect at temperature 0: set the temperature, too.")

    def _require(self, name: str, condition: bool, remedy: str) -> None:
        require(condition, f"{option(name)} is {getattr(self, name)}: {remedy}")


def option(name: str) -> str:
    """Return the option of a command line for a setting."""
    return f"--{name.replace('_', '-')}"


HELP = {
    "policy": "which positions are filled first: of the highest confidence (probability of the likeliest "
    "token), the highest margin (that less the second likeliest's), the lowest entropy, at random, or left "
    "to right",
    "tokens_per_step": "tokens filled at a decoding step",
    "threshold": "also fill every position with a confidence above this",
    "temperature": "draw tokens from softmax(logits / temperature); 0 = take the likeliest",
    "top_k": "draw among the k likeliest tokens only",
    "top_p": "draw among the fewest tokens whose probabilities, likeliest first, come to p",
    "seed": "of the noise; what is drawn does not depend on the batch size",
}
TYPES = {"policy": str, "tokens_per_step": int, "top_k": int, "seed": int}  # the others are float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a command line one option for each setting."""
    group = parser.add_argument_group("sampler")
    for field in fields(SamplingSettings):
        kind, choices = TYPES.get(field.name, float), list(POLICIES) if field.name == "policy" else None
        text = HELP[field.name]
        group.add_argument(option(field.name), type=kind, choices=choices, default=field.default, help=text)


def read_options(options: argparse.Namespace) -> SamplingSettings:
    """Return the checked settings of a parsed command line; raises a `UserError` for bad ones."""
    names = [field.name for field in fields(SamplingSettings)]
    settings = SamplingSettings(**{name: getattr(options, name) for name in names})
    settings.check()
    return settings
