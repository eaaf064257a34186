"""Optimizer, schedule, batch and engine settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.config.checks import require, require_not_negative, require_positive
from pipeline.config.model import ModelConfig

HIGHEST_LEARNING_RATE = 0.1
Recompute = Literal["none", "swiglu", "blocks"]


@dataclass
class OptimizerConfig:
    """Optimizer.

    Args:
        kind: adamw; or muon = Muon for the matrices inside the blocks, AdamW for the embedding, output layer,
            norms and biases. Muon keeps no second moment: less memory. Not with offload_optimizer.
        learning_rate: Peak learning rate.
        muon_learning_rate: Peak learning rate of Muon's matrices; null = learning_rate. Muon's updates are
            scaled to the size of AdamW's, so a rate tuned for AdamW is a good start.
        muon_momentum: Decay rate of Muon's momentum.
        weight_decay: Decoupled weight decay.
        decay_norms_and_embeddings: Also decay norm weights, biases and the embedding.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Epsilon added to the denominator.
        gradient_clip: Maximum global gradient norm; 0 = no clipping.
        ema_decay: Decay of an exponential moving average of the weights for evaluation and export, such as
            0.9999; null = no average.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    muon_learning_rate: float | None = None
    muon_momentum: float = 0.95
    weight_decay: float = 0.01
    decay_norms_and_embeddings: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    gradient_clip: float = 1.0
    ema_decay: float | None = None

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        require_positive("optimizer", self, "learning_rate", "eps")
        self._check_muon()
        for key in ("learning_rate", "muon_learning_rate"):
            rate = getattr(self, key)
            if rate is None:
                continue
            require(
                rate <= HIGHEST_LEARNING_RATE,
                f"optimizer.{key} is {rate}: the optimizer moves every weight by about that much per step; "
                f"give {HIGHEST_LEARNING_RATE} or less, such as 3e-4.",
            )
            require(
                rate * self.weight_decay < HIGHEST_LEARNING_RATE,
                f"optimizer.weight_decay is {self.weight_decay}: with optimizer.{key} = {rate}, each step "
                "would shrink every weight by more than a tenth. Lower it.",
            )
        for key in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, key)
            require(0 <= value < 1, f"optimizer.{key} is {value}: it must be at least 0 and below 1.")
        require_not_negative("optimizer", self, "weight_decay", "gradient_clip")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"optimizer.ema_decay is {self.ema_decay}: give a value between 0 and 1, such as 0.9999, or null "
            "for no average.",
        )

    def _check_muon(self) -> None:
        """Raise a `UserError` for a setting of Muon that is invalid or has no effect."""
        default = type(self)()
        for key in ("muon_learning_rate", "muon_momentum"):
            value = getattr(self, key)
            require(
                self.kind == "muon" or value == getattr(default, key),
                f"optimizer.{key} is {value}, which has no effect with optimizer.kind = {self.kind!r}: leave "
                "it out, or set optimizer.kind to 'muon'.",
            )
        if self.muon_learning_rate is not None:
            require_positive("optimizer", self, "muon_learning_rate")


@dataclass
class ScheduleConfig:
    """Learning rate schedule.

    Args:
        kind: cosine = warm-up, then cosine decay; wsd = warm-up, constant, then a final decay; inverse_sqrt =
            warm-up, then peak x sqrt(warmup_steps / step), with a final decay if decay_steps is set.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Steps of the final decay (wsd and inverse_sqrt).
        decay_shape: How the final decay falls over its share p of done steps: linear = 1 - p; cosine =
            (1 + cos(pi p)) / 2; 1-sqrt = 1 - sqrt(p).
        final_ratio: Learning rate at the last step, as a fraction of the peak; without a final decay, wsd and
            inverse_sqrt do not use it.
        rewarm_steps: Steps after train.branch_from over which the rate climbs from 0 to that of the schedule.
        batch_scaling: How the learning rate grows with the batch in train.batch_ramp; optimizer.learning_rate
            is that of train.global_batch_size. sqrt = with the square root of the batch; linear = with the
            batch; none = not at all.
    """

    kind: Literal["cosine", "wsd", "inverse_sqrt"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    final_ratio: float = 0.1
    rewarm_steps: int = 0
    batch_scaling: Literal["none", "sqrt", "linear"] = "none"

    def check(self, steps: int) -> None:
        """Raise a `UserError` for the first setting that is invalid in a run of `steps` steps."""
        require_not_negative("schedule", self, "warmup_steps", "decay_steps", "rewarm_steps")
        require(
            self.warmup_steps + self.decay_steps <= steps,
            f"schedule.warmup_steps + schedule.decay_steps is {self.warmup_steps} + {self.decay_steps}, more "
            f"than train.steps = {steps}: shorten them or train longer.",
        )
        for key, default in (("decay_steps", 0), ("decay_shape", "linear")):
            value = getattr(self, key)
            require(
                self.kind != "cosine" or value == default,
                f"schedule.{key} is {value}, which has no effect with schedule.kind = {self.kind!r}: leave "
                "it out, or set schedule.kind to 'wsd'.",
            )
        require(
            0 <= self.final_ratio <= 1,
            f"schedule.final_ratio is {self.final_ratio}: it must be between 0 and 1.",
        )
        if self.kind == "inverse_sqrt":
            self._check_inverse_sqrt(steps)

    def _check_inverse_sqrt(self, steps: int) -> None:
        require(
            self.warmup_steps > 0,
            "schedule.warmup_steps is 0, but the length of the warm-up sets how fast schedule.kind = "
            "'inverse_sqrt' falls: give some steps.",
        )
        lowest = (self.warmup_steps / steps) ** 0.5
        require(
            self.decay_steps == 0 or self.final_ratio <= lowest,
            f"schedule.final_ratio is {self.final_ratio}, but inverse_sqrt falls to {lowest:.4g} of the peak "
            f"in train.steps = {steps} without a final decay: give {lowest:.4g} or less, or leave out "
            "schedule.decay_steps.",
        )


@dataclass
class LargerBatchConfig:
    """A larger batch of a ramp.

    Args:
        first_step: Step from which on the batch has this size.
        global_batch_size: As train.global_batch_size; larger than before.
    """

    first_step: int
    global_batch_size: int


@dataclass
class TrainConfig:
    """Training loop.

    Args:
        steps: Optimizer steps.
        global_batch_size: Examples per optimizer step, over all ranks.
        batch_ramp: Larger global batches by step, such as [{first_step: 1001, global_batch_size: 128}].
            See schedule.batch_scaling.
        micro_batch_size: Maximum examples per forward pass on one rank; lowered to the next divisor of the
            rank's share of every global batch. Gradient accumulation makes up the rest.
        seed: Seed of the initial weights, the example order and all masks.
        log_interval: Steps between two log lines and two writes of the metrics.
        log_samples: Write the examples that each step was trained on to samples/ in the run folder; slower.
        initial_weights: Start from the weights in this folder, written by tools/import_hf.py,
            tools/export_hf.py or tools/average_checkpoints.py; null = random weights.
        branch_from: Begin the run as a branch of RUN or RUN:STEP, another run folder: weights, optimizer
            state, moving average and step are those of its newest checkpoint or that of STEP, all else is
            as configured. Only read while this run has no checkpoint.
    """

    steps: int = 1000
    global_batch_size: int = 64
    batch_ramp: list[LargerBatchConfig] = field(default_factory=list)
    micro_batch_size: int = 32
    seed: int = 1234
    log_interval: int = 10
    log_samples: bool = False
    initial_weights: str | None = None
    branch_from: str | None = None

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        require(
            self.branch_from is None or self.initial_weights is None,
            f"train.branch_from is {self.branch_from} and train.initial_weights is {self.initial_weights}: a "
            "run begins from one of them; remove the other.",
        )
        require_positive("train", self, "steps", "global_batch_size", "micro_batch_size", "log_interval")
        require(0 <= self.seed < 2**31, f"train.seed is {self.seed}: it must be at least 0 and below 2^31.")
        self._check_ramp()

    def _check_ramp(self) -> None:
        step, size = 1, self.global_batch_size
        for number, larger in enumerate(self.batch_ramp):
            section, of = (
                f"train.batch_ramp[{number}]",
                "the entry before it" if number else "the first batch",
            )
            require(
                larger.first_step > step,
                f"{section}.first_step is {larger.first_step}: it must be above {step}, that of {of}.",
            )
            require(
                larger.global_batch_size > size,
                f"{section}.global_batch_size is {larger.global_batch_size}: the batch only grows, give more "
                f"than {size}, that of {of}.",
            )
            step, size = larger.first_step, larger.global_batch_size
        require(
            step <= self.steps,
            f"train.batch_ramp[{len(self.batch_ramp) - 1}].first_step is {step}, beyond train.steps = "
            f"{self.steps}: lower it, leave the entry out, or train longer.",
        )

    @property
    def batches(self) -> dict[int, int]:
        """Every global batch of the run, by its first step, in order."""
        larger = {each.first_step: each.global_batch_size for each in self.batch_ramp}
        return {1: self.global_batch_size} | larger

    def batch_at(self, step: int) -> int:
        """Return the global batch of `step`; the first step is 1."""
        return max(size for first_step, size in self.batches.items() if first_step <= max(1, step))

    def examples_until(self, step: int) -> int:
        """Return the examples trained in the steps up to `step`, an example counted once for each step."""
        total, before = 0, 0
        for first_step, size in self.batches.items():
            total += (size - before) * max(0, step + 1 - first_step)
            before = size
        return total

    def at(self, step: int) -> TrainConfig:
        """Return these settings with the batch of `step` in the whole run."""
        return replace(self, global_batch_size=self.batch_at(step), batch_ramp=[])

    def common_share(self, data_size: int) -> int:
        """Return the greatest number of examples that divides a data-parallel rank's share of every batch."""
        return math.gcd(*self.batches.values()) // data_size

    def fitted(self, data_size: int, sequence_size: int = 1) -> TrainConfig:
        """Return these settings with micro_batch_size lowered to a divisor of a rank's share of every batch.

        The global batch stays the same, so a run resumes with the same losses on more or fewer ranks.

        Args:
            data_size: number of data-parallel ranks; a sequence-parallel group counts as one.
            sequence_size: ranks per sequence-parallel group.

        Raises:
            UserError: if a global batch does not divide evenly among the ranks.
        """
        ranks, common = data_size * sequence_size, self.common_share(1)
        possible = [str(n * sequence_size) for n in range(1, common + 1) if common % n == 0]
        for number, total in enumerate(self.batches.values()):
            key = f"batch_ramp[{number - 1}].global_batch_size" if number else "global_batch_size"
            require(
                total % data_size == 0,
                f"train.{key} = {total} examples cannot be split evenly over {ranks} ranks: start "
                f"{', '.join(possible)} ranks, or begin a new run with another global batch.",
            )
        share = self.common_share(data_size)
        fitting = max(n for n in range(1, min(share, self.micro_batch_size) + 1) if share % n == 0)
        return replace(self, micro_batch_size=fitting)

    def accumulation(self, data_size: int) -> int:
        """Return the micro-batches per rank in the first step; call this on `fitted` settings."""
        return self.global_batch_size // (data_size * self.micro_batch_size)


@dataclass
class EngineConfig:
    """Execution engine.

    Args:
        kind: deepspeed; or plain = a single process of plain PyTorch, for debugging.
        deepspeed_config: DeepSpeed JSON with the ZeRO and communication settings (ds_configs/).
        device: auto = GPU if available, otherwise CPU.
        precision: auto = bf16 on GPUs, fp32 on CPUs.
        activation_checkpointing: Activations to recompute in the backward pass instead of keeping them; the
            results are identical. swiglu = the element-wise products inside each SwiGLU, a quarter less
            memory than none for 1% of the time; blocks = everything but the input of each transformer
            block, the least memory, a third more time in the blocks.
        compile: Compile each transformer block with torch.compile, which fuses its element-wise operations.
            With every ZeRO stage. Takes up to a minute at the start and when shapes change. Needs a compiler.
        compile_functions: Compile what holds no weights: rotary embedding, product inside SwiGLU, chains and
            their statistics. With every ZeRO stage. Needs a compiler.
        fused_head: Compute loss, confidence and gradient of the logits by two Triton kernels: on a GPU with
            Triton, which torch brings, and a C compiler, where objective.policy needs no other score.
        head_row_multiple: Pad the masked positions of a micro-batch to a multiple of this in the output
            layer, such as 128, so that shapes repeat. 1 = off.
        deterministic: Use deterministic kernels alone: on GPUs, the same run then repeats bit for bit, and so
            does a resumed one on the same number and kind of GPUs. Slower. CPU runs repeat without it.
        sequence_parallel_size: Consecutive ranks that split the same sequences, each with an equal part of
            the positions (DeepSpeed-Ulysses), for sequences too long for one GPU. 1 = off.
    """

    kind: Literal["deepspeed", "plain"] = "deepspeed"
    deepspeed_config: str = "ds_configs/zero3.json"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: Recompute = "swiglu"
    compile: bool = False
    compile_functions: bool = False
    fused_head: bool = True
    head_row_multiple: int = 1
    deterministic: bool = False
    sequence_parallel_size: int = 1

    def check(self, model: ModelConfig, sequence_length: int) -> None:
        """Raise a `UserError` for the first setting that is invalid for the model and sequence length."""
        size = self.sequence_parallel_size
        require_positive("engine", self, "sequence_parallel_size", "head_row_multiple")
        require(
            size == 1 or self.kind == "deepspeed",
            f"engine.sequence_parallel_size is {size}, but engine.kind is {self.kind!r}: set the size to 1, "
            "or engine.kind to 'deepspeed'.",
        )
        for key, value in (
            ("model.heads", model.heads),
            ("model.kv_heads", model.kv_heads or model.heads),
            ("data.sequence_length", sequence_length),
        ):
            require(
                value % size == 0, f"engine.sequence_parallel_size is {size}: it must divide {key} = {value}."
            )
