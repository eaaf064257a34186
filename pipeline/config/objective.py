"""Training objective settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.config.checks import require, require_not_negative, require_positive

Kind = Literal["puma", "random_masking", "autoregressive"]

PolicyName = Literal["confidence", "margin", "entropy", "random", "left_to_right"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
UNSCORED = ("random", "left_to_right")  # policies that do not read the model's scores


@dataclass
class ObjectiveConfig:
    """Training objective.

    Args:
        kind: puma = progressive unmasking; random_masking = a random subset of each answer is masked;
            autoregressive = next-token prediction from left to right.
        switch_to: Objective to switch to at switch_step; the settings below apply to both. null = no switch.
        switch_step: First step of switch_to; all chains restart there.
        policy: Which masked positions a PUMA chain reveals first: confidence = highest probability of the
            most likely token; margin = largest gap between the two most likely tokens; entropy = lowest
            entropy; random and left_to_right = that order, whatever the model predicts.
        stages: Number of stages K of a PUMA chain.
        stages_increment: Stages added at each increase of K; 0 = constant K.
        stages_first_increase: First step with the increased K.
        stages_interval: Steps between two increases of K.
        stages_maximum: Upper limit of K; null = no limit.
        threshold: Also reveal every position with a confidence above this probability; null = standard mode.
        stages_skipped: Most stages that a PUMA chain skips at a step; how many is drawn anew at each, evenly.
            Chains become shorter, and their inputs less alike. 0 = none.
        reveal_pool: Reveal random positions among this share of a PUMA chain's masked positions, those that
            the policy ranks highest. 0 = reveal the highest ranked, near 1 = nearly random.
        random_share: Share of PUMA chains that use a fresh random mask at every stage instead.
        turns: Keep turns x train.global_batch_size PUMA chains in flight and train each of them every
            turns-th step, so that consecutive steps share no example. 1 = train every chain at every step.
        mask_count: Number of positions that random masking masks: uniform = n drawn uniformly from 1 to the
            answer length L, loss weight 1/n per position; bernoulli = each position with probability t, t
            uniform in (0, 1), loss weight 1/(t L).
        mask_ratio_std: Draw the mask ratio, n/L, from a normal distribution of this standard deviation, cut
            off to the range below; PUMA's stages follow it, too. null = evenly.
        mask_ratio_mean: Mean of that normal distribution.
        mask_ratio_minimum: Lowest mask ratio.
        mask_ratio_maximum: Highest mask ratio.
        mask_ratio_weighted: Weigh random masks so that the loss is the bound in spite of mask_ratio_std.
            false = each mask weighs the same.
        stratified: Spread t (or n/L) evenly over the global batch, which lowers the variance of the loss.
        complementary: Train on each random mask and, at the next step, on its complement.
        block_size: Block diffusion: split answers into blocks of this many tokens, each with its own chain
            and conditioned on the clean blocks before it. null = one chain per answer.
        attention_annealing_steps: Start masked training with causal attention, to continue from causal
            weights, and let each position attend to more and more later positions until attention is
            bidirectional after this many steps. 0 = bidirectional from the start.
    """

    kind: Kind = "puma"
    switch_to: Kind | None = None
    switch_step: int | None = None
    policy: PolicyName = "confidence"
    stages: int = 8
    stages_increment: int = 0
    stages_first_increase: int | None = None
    stages_interval: int | None = None
    stages_maximum: int | None = None
    threshold: float | None = None
    stages_skipped: int = 0
    reveal_pool: float = 0.0
    random_share: float = 0.0
    turns: int = 1
    mask_count: Literal["uniform", "bernoulli"] = "uniform"
    mask_ratio_std: float | None = None
    mask_ratio_mean: float = 0.5
    mask_ratio_minimum: float = 0.0
    mask_ratio_maximum: float = 1.0
    mask_ratio_weighted: bool = False
    stratified: bool = False
    complementary: bool = False
    block_size: int | None = None
    attention_annealing_steps: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The objectives of the run, in order."""
        return (self.kind,) if self.switch_to is None else (self.kind, self.switch_to)

    def kind_at(self, step: int) -> Kind:
        """Return the objective at `step`; the first step is 1."""
        switched = self.switch_to is not None and self.switch_step is not None and step >= self.switch_step
        return self.switch_to if switched else self.kind  # type: ignore[return-value]

    def check(self, prediction: str, sequence_length: int, steps: int) -> None:
        """Raise a `UserError` for the first setting that is invalid or has no effect."""
        growth = ("stages_first_increase", "stages_interval", "stages_maximum")
        require_positive("objective", self, "stages", *growth, "turns", "block_size")
        self._check_switch(steps)
        self._check_stages()
        self._check_chains()
        self._check_random_masks()
        self._check_mask_ratio()
        self._check_visibility(prediction, sequence_length)

    def _check_switch(self, steps: int) -> None:
        require(
            (self.switch_to is None) == (self.switch_step is None),
            f"objective.switch_to is {self.switch_to} and objective.switch_step is {self.switch_step}: give "
            "both, or neither.",
        )
        require(
            self.switch_to != self.kind,
            f"objective.switch_to is {self.switch_to}, which is objective.kind itself: choose another one.",
        )
        require(
            self.switch_step is None or 2 <= self.switch_step <= steps,
            f"objective.switch_step is {self.switch_step}: it must be between 2 and train.steps = {steps}.",
        )

    def _check_stages(self) -> None:
        require(
            self.stages_increment >= 0,
            f"objective.stages_increment is {self.stages_increment}: K only grows, give 0 or more.",
        )
        growth = ("stages_first_increase", "stages_interval")
        for key in (*growth, "stages_maximum"):
            value, grows = getattr(self, key), self.stages_increment > 0
            require(
                value is None or grows,
                f"objective.{key} is {value}, but objective.stages_increment is 0: set both.",
            )
            require(
                value is not None or not grows or key not in growth,
                f"objective.stages_increment is {self.stages_increment}: set objective.{key} too.",
            )
        require(
            self.stages_maximum is None or self.stages_maximum >= self.stages,
            f"objective.stages_maximum is {self.stages_maximum}, below objective.stages = {self.stages}: "
            "raise it, or set it to null for no limit.",
        )

    def _check_chains(self) -> None:
        require(
            self.threshold is None or 0 < self.threshold < 1,
            f"objective.threshold is {self.threshold}: it is a probability, give a value between 0 and 1, "
            "or null for standard mode.",
        )
        require(
            self.threshold is None or self.policy not in UNSCORED,
            f"objective.threshold is {self.threshold}: it reveals by confidence, which conflicts with "
            f"objective.policy = {self.policy!r}. Set it to null, or choose another policy.",
        )
        require(
            0 <= self.random_share < 1,
            f"objective.random_share is {self.random_share}: give a share from 0 to below 1 (for 1, set "
            "objective.kind to random_masking).",
        )
        require_not_negative("objective", self, "stages_skipped")
        require(
            0 <= self.reveal_pool < 1,
            f"objective.reveal_pool is {self.reveal_pool}: give a share from 0 to below 1 (for 1, set "
            "objective.policy to random).",
        )
        require(
            self.reveal_pool == 0 or self.policy not in UNSCORED,
            f"objective.reveal_pool is {self.reveal_pool}, which has no effect with objective.policy = "
            f"{self.policy!r}: set it to 0, or choose a policy that reads scores.",
        )
        for key, unset in (
            ("threshold", None),
            ("random_share", 0),
            ("stages_increment", 0),
            ("stages_skipped", 0),
            ("reveal_pool", 0),
            ("turns", 1),
            ("policy", "confidence"),
        ):
            self._require_kind(key, getattr(self, key) != unset, "puma" in self.kinds, "puma")

    def _check_random_masks(self) -> None:
        masks = "random_masking" in self.kinds or self.random_share > 0
        for key, unset in (("mask_count", "uniform"), ("stratified", False), ("complementary", False)):
            self._require_kind(key, getattr(self, key) != unset, masks, "random_masking")
        require(
            not self.complementary or self.mask_count == "uniform",
            "objective.complementary with objective.mask_count = 'bernoulli': pairs are drawn by "
            "their number of masked positions. Set objective.mask_count to uniform.",
        )

    def _check_mask_ratio(self) -> None:
        low, high, std = self.mask_ratio_minimum, self.mask_ratio_maximum, self.mask_ratio_std
        require(
            0 <= low < high <= 1,
            f"objective.mask_ratio_minimum is {low} and objective.mask_ratio_maximum is {high}: give 0 <= "
            "minimum < maximum <= 1.",
        )
        require(
            std is None or std > 0,
            f"objective.mask_ratio_std is {std}: give a standard deviation above 0, or null for even ratios.",
        )
        require(
            std is not None or self.mask_ratio_mean == 0.5,
            f"objective.mask_ratio_mean is {self.mask_ratio_mean}, which has no effect without "
            "objective.mask_ratio_std: set both, or leave both out.",
        )
        require(
            std is None or low - 4 * std <= self.mask_ratio_mean <= high + 4 * std,
            f"objective.mask_ratio_mean is {self.mask_ratio_mean}, more than 4 standard deviations from the "
            "range of the mask ratio: move it closer.",
        )
        even, masked = std is None and (low, high) == (0, 1), self.kinds != ("autoregressive",)
        for key, unset in (("mask_ratio_std", None), ("mask_ratio_minimum", 0), ("mask_ratio_maximum", 1)):
            self._require_kind(key, getattr(self, key) != unset, masked, "puma or random_masking")
        require(
            even or self.mask_count == "uniform",
            "objective.mask_ratio_std, mask_ratio_minimum or mask_ratio_maximum with objective.mask_count = "
            f"{self.mask_count!r}: they set the distribution of n. Set objective.mask_count to uniform.",
        )
        require(
            not self.mask_ratio_weighted or (std is not None and (low, high) == (0, 1)),
            "objective.mask_ratio_weighted is true: weights keep the bound only where every mask ratio occurs"
            ", and change nothing where all are alike. Set objective.mask_ratio_std, without a range.",
        )
        require(
            not (self.mask_ratio_weighted and self.complementary),
            "objective.mask_ratio_weighted with objective.complementary: a complement is drawn from another "
            "distribution. Set one of them to false.",
        )
        self._require_kind(
            "mask_ratio_weighted",
            self.mask_ratio_weighted,
            "random_masking" in self.kinds or self.random_share > 0,
            "random_masking",
        )

    def _check_visibility(self, prediction: str, sequence_length: int) -> None:
        require(
            "autoregressive" not in self.kinds or prediction == "shifted",
            f"objective.kind or switch_to is 'autoregressive', but model.prediction is {prediction!r}: a "
            "next token is predicted at the position before it. Set model.prediction to shifted.",
        )
        masked = self.kinds != ("autoregressive",)
        self._require_kind("block_size", self.block_size is not None, masked, "puma or random_masking")
        require(
            self.block_size is None or self.block_size < sequence_length,
            f"objective.block_size is {self.block_size}: it must be below data.sequence_length = "
            f"{sequence_length}; leave it out for a single block.",
        )
        anneal = self.attention_annealing_steps
        require_not_negative("objective", self, "attention_annealing_steps")
        self._require_kind("attention_annealing_steps", anneal > 0, masked, "puma or random_masking")
        require(
            anneal == 0 or self.block_size is None,
            f"objective.attention_annealing_steps is {anneal}, and objective.block_size is {self.block_size}"
            ": blocks never attend to later blocks. Set one of the two.",
        )

    def _require_kind(self, key: str, is_set: bool, is_used: bool, kind: str) -> None:
        require(
            not is_set or is_used,
            f"objective.{key} is {getattr(self, key)}, which has no effect with objective.kind = "
            f"{self.kind!r}: leave it out, or train with {kind}.",
        )
