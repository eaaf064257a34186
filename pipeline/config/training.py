"""Settings of the steps: optimizer, schedule, batch, engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pipeline.config.checks import require, require_positive
from pipeline.config.model import ModelConfig

HIGHEST_LEARNING_RATE = 0.1
Recompute = Literal["none", "swiglu", "blocks"]


@dataclass
class OptimizerConfig:
    """AdamW.

    Args:
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        decay_norms_and_embeddings: Decay norm weights, biases and the embedding too.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Term added to the denominator.
        gradient_clip: Largest global gradient norm; 0 = no clipping.
        ema_decay: Keep a moving average of the weights with this decay, such as 0.9999, for evaluation and
            export; none = no average.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    decay_norms_and_embeddings: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    gradient_clip: float = 1.0
    ema_decay: float | None = None

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("optimizer", self, "learning_rate", "eps")
        require(
            self.learning_rate <= HIGHEST_LEARNING_RATE,
            f"optimizer.learning_rate is {self.learning_rate}: AdamW moves every weight by about so much a "
            f"step, give {HIGHEST_LEARNING_RATE} or less, such as 3e-4.",
        )
        require(
            self.learning_rate * self.weight_decay < HIGHEST_LEARNING_RATE,
            f"optimizer.weight_decay is {self.weight_decay}: with optimizer.learning_rate = "
            f"{self.learning_rate} a step would take more than a tenth off every weight. Lower it.",
        )
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(0 <= value < 1, f"optimizer.{key} is {value}: it must be at least 0 and below 1.")
        for key in ("weight_decay", "gradient_clip"):
            value = getattr(self, key)
            require(value >= 0, f"optimizer.{key} is {value}: it must be 0 or more.")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"optimizer.ema_decay is {self.ema_decay}: give a value between 0 and 1, such as 0.9999, or null "
            "for no average.",
        )


@dataclass
class ScheduleConfig:
    """Learning rate over the steps.

    Args:
        kind: cosine = warm-up, then half a cosine; wsd = warm-up, stable, linear decay at the end.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Steps of the final decay (wsd only).
        final_ratio: Learning rate at the last step, as a share of the peak.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    final_ratio: float = 0.1

    def check(self, steps: int) -> None:
        """Raise a `UserError` for the first setting that cannot work in a run of `steps` steps."""
        for key in ("warmup_steps", "decay_steps"):
            value = getattr(self, key)
            require(value >= 0, f"schedule.{key} is {value}: it must be 0 or more.")
        require(
            self.warmup_steps + self.decay_steps <= steps,
            f"schedule.warmup_steps + schedule.decay_steps is {self.warmup_steps} + {self.decay_steps}, more "
            f"than train.steps = {steps}: shorten them or train longer.",
        )
        require(
            self.kind == "wsd" or self.decay_steps == 0,
            f"schedule.decay_steps is {self.decay_steps}, which has no effect with schedule.kind = "
            f"{self.kind!r}: leave it out, or set schedule.kind to 'wsd'.",
        )
        require(
            0 <= self.final_ratio <= 1,
            f"schedule.final_ratio is {self.final_ratio}: it must be between 0 and 1.",
        )


@dataclass
class TrainConfig:
    """The run itself.

    Args:
        steps: Optimizer steps.
        global_batch_size: Sequences a step over all ranks.
        micro_batch_size: Sequences a forward on one rank, at most: lowered where it does not divide a rank's
            share of the global batch. The accumulation follows.
        seed: Seed of the initial weights, the order of the examples and every mask.
        log_interval: Steps between two lines and TensorBoard points.
        log_samples: Write which examples each step was trained on to samples/ in the run folder; slower.
        initial_weights: Folder of tools/import_hf.py or tools/export_hf.py with the weights that the run
            begins at; by default they are random.
    """

    steps: int = 1000
    global_batch_size: int = 64
    micro_batch_size: int = 32
    seed: int = 1234
    log_interval: int = 10
    log_samples: bool = False
    initial_weights: str | None = None

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("train", self, "steps", "global_batch_size", "micro_batch_size", "log_interval")
        require(0 <= self.seed < 2**31, f"train.seed is {self.seed}: it must be at least 0 and below 2^31.")

    def fitted(self, data_size: int, sequence_size: int = 1) -> TrainConfig:
        """Return these settings with the largest micro-batch, up to the given one, that fits the ranks.

        The global batch stays as it is: a run goes on with the same losses on more or fewer ranks.

        Args:
            data_size: ranks among which the batch is divided; those of a sequence-parallel group count once.
            sequence_size: ranks of such a group.

        Raises:
            UserError: when the sequences of a step cannot be dealt evenly.
        """
        total, ranks = self.global_batch_size, data_size * sequence_size
        possible = [str(n * sequence_size) for n in range(1, total + 1) if total % n == 0]
        require(
            str(ranks) in possible,
            f"train.global_batch_size = {total} sequences cannot be dealt evenly to {ranks} ranks: start "
            f"{', '.join(possible)} ranks, or begin a new run with another global batch.",
        )
        share = total // data_size
        fitting = max(n for n in range(1, min(share, self.micro_batch_size) + 1) if share % n == 0)
        return replace(self, micro_batch_size=fitting)

    def accumulation(self, data_size: int) -> int:
        """Return the micro-batches that a rank runs a step; these settings must be `fitted`."""
        return self.global_batch_size // (data_size * self.micro_batch_size)


@dataclass
class EngineConfig:
    """What executes the steps.

    Args:
        kind: deepspeed, or plain = one process of plain torch, for debugging.
        deepspeed_config: DeepSpeed JSON with ZeRO and communication settings (ds_configs/).
        device: auto = GPU where there is one.
        precision: auto = bf16 on GPUs, fp32 on CPUs.
        activation_checkpointing: What is computed again in the backward instead of being kept; the results
            are the same. swiglu = the element-wise products inside each SwiGLU: a quarter less memory than
            with none, at 1% of the time; blocks = all but the input of each transformer block: least
            memory, a third more time there.
        compile: Compile each transformer block by torch.compile, which joins its element-wise operations;
            takes up to a minute at the start and when shapes change. Needs a compiler; not with ZeRO-3.
        sequence_parallel_size: Consecutive ranks that share their sequences, each with an equal part of the
            positions (DeepSpeed-Ulysses): for sequences too long for one GPU.
    """

    kind: Literal["deepspeed", "plain"] = "deepspeed"
    deepspeed_config: str = "ds_configs/zero3.json"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: Recompute = "swiglu"
    compile: bool = False
    sequence_parallel_size: int = 1

    def check(self, model: ModelConfig, sequence_length: int) -> None:
        """Raise a `UserError` for the first setting that cannot work with the model and its sequences."""
        size = self.sequence_parallel_size
        require_positive("engine", self, "sequence_parallel_size")
        require(
            size == 1 or self.kind == "deepspeed",
            f"engine.sequence_parallel_size is {size}, but engine.kind is {self.kind!r}: one of the two must "
            "change, to 1 or to 'deepspeed'.",
        )
        for key, value in (
            ("model.heads", model.heads),
            ("model.kv_heads", model.kv_heads or model.heads),
            ("data.sequence_length", sequence_length),
        ):
            require(
                value % size == 0,
                f"engine.sequence_parallel_size is {size}: it must divide {key} = {value}.",
            )
