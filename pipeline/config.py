"""Every setting of a run, its unit, its check and its remedy; no other module parses settings.

A run is described by a YAML file with one section for each dataclass below. Any key can be overridden on
the command line (``--train.steps 1000``). `load` returns a checked `Config`; what is wrong becomes one
`UserError` that names the key, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from pipeline.cli import UserError, nearest

# typing.Optional throughout: jsonargparse resolves the annotations at run time, on Python 3.10 too.


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_positive(section: str, config: Any, *keys: str) -> None:
    """Raise a `UserError` for the first of `keys` that is set and not above zero."""
    for key in keys:
        value = getattr(config, key)
        require(value is None or value > 0, f"{section}.{key} is {value}: it must be above 0.")


@dataclass
class DataConfig:
    """What the model is trained on.

    Args:
        tokenizer: Folder of the tokenizer (tools/train_tokenizer.py).
        prefixes: Datasets as written by tools/preprocess_data.py, each a path without .bin/.idx.
        kind: pairs = one prompt/answer document a sample; packed = text cut into samples of sequence_length.
        sequence_length: Tokens in a sample.
        weights: Share of each prefix in a blend; without it every sample of each is used once an epoch.
        split: Shares of the documents for training, validation and test.
        padding: What follows a short answer: ignored = never seen by the model; eos_targets = end-of-sequence
            tokens that are part of the answer, so that the model learns where to stop.
        too_long: What to do with a pair longer than sequence_length: error or drop.
        cache: Folder of the built sample indices; by default dataset_cache in the run folder.
        workers: Threads that read samples ahead; 0 reads in the training thread.
    """

    tokenizer: str = "data/tokenizer"
    prefixes: list[str] = field(default_factory=list)
    kind: Literal["pairs", "packed"] = "packed"
    sequence_length: int = 512
    weights: list[float] | None = None
    split: str = "98,2,0"
    padding: Literal["ignored", "eos_targets"] = "ignored"
    too_long: Literal["error", "drop"] = "error"
    cache: str | None = None
    workers: int = 2

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("data", self, "sequence_length")
        require(self.workers >= 0, f"data.workers is {self.workers}: it must be 0 or more.")
        require(
            bool(self.prefixes),
            "data.prefixes is empty: name at least one dataset written by tools/preprocess_data.py.",
        )
        if self.weights is not None:
            require(
                len(self.weights) == len(self.prefixes) and all(w > 0 for w in self.weights),
                f"data.weights is {self.weights}: give one weight above 0 for each of the "
                f"{len(self.prefixes)} data.prefixes.",
            )
        parts = self.split.split(",")
        require(
            len(parts) == 3
            and all(p.strip().replace(".", "", 1).isdigit() for p in parts)
            and float(parts[0]) > 0,
            f"data.split is {self.split!r}: give three shares for training, validation and test, "
            "the first above 0, such as '98,2,0'.",
        )


@dataclass
class ModelConfig:
    """A bidirectional transformer with Qwen2/Llama parameter names.

    Args:
        layers: Transformer blocks.
        hidden_size: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads (grouped-query attention); by default as many as heads.
        intermediate_size: Width of the SwiGLU.
        vocab_size: Rows of the embedding; by default the tokenizer's, rounded up to a multiple of 8.
        tie_embeddings: Use the embedding as output matrix.
        attention_bias: Biases on the query, key and value projections (Qwen2 has them).
        rope_theta: Base of the rotary position embedding.
        norm_eps: Epsilon of RMSNorm.
        init_std: Standard deviation of the initial weights.
    """

    layers: int = 4
    hidden_size: int = 128
    heads: int = 4
    kv_heads: int | None = None
    intermediate_size: int = 384
    vocab_size: int | None = None
    tie_embeddings: bool = True
    attention_bias: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        positive = ("layers", "hidden_size", "heads", "kv_heads", "intermediate_size", "vocab_size")
        require_positive("model", self, *positive, "rope_theta", "norm_eps", "init_std")
        require(
            self.hidden_size % (2 * self.heads) == 0,
            f"model.hidden_size is {self.hidden_size}: it must be a multiple of 2 x model.heads = "
            f"{2 * self.heads}, because rotary embeddings turn pairs of a head's dimensions.",
        )
        require(
            self.heads % (self.kv_heads or self.heads) == 0,
            f"model.kv_heads is {self.kv_heads}: it must divide model.heads = {self.heads}.",
        )


@dataclass
class ObjectiveConfig:
    """How training inputs are masked.

    Args:
        kind: puma = progressive unmasking; random_masking = a uniformly drawn number of random positions.
        stages: K, the number of stages of a PUMA chain.
        threshold: Also reveal every position with a confidence above this; none = standard mode.
    """

    kind: Literal["puma", "random_masking"] = "puma"
    stages: int = 8
    threshold: float | None = None

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("objective", self, "stages")
        require(
            self.threshold is None or 0 < self.threshold < 1,
            f"objective.threshold is {self.threshold}: it is a probability, give a value between 0 and 1, "
            "or null for standard mode.",
        )


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
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    decay_norms_and_embeddings: bool = False
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    gradient_clip: float = 1.0

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("optimizer", self, "learning_rate", "eps")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(0 <= value < 1, f"optimizer.{key} is {value}: it must be at least 0 and below 1.")
        for key in ("weight_decay", "gradient_clip"):
            value = getattr(self, key)
            require(value >= 0, f"optimizer.{key} is {value}: it must be 0 or more.")


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
            0 <= self.final_ratio <= 1,
            f"schedule.final_ratio is {self.final_ratio}: it must be between 0 and 1.",
        )


@dataclass
class TrainConfig:
    """The run itself.

    Args:
        steps: Optimizer steps.
        global_batch_size: Sequences a step over all ranks; also the number of slots.
        micro_batch_size: Sequences a forward on one rank; the accumulation follows from both.
        seed: Seed of the initial weights, the order of the samples and every mask.
        log_interval: Steps between two lines and TensorBoard points.
    """

    steps: int = 1000
    global_batch_size: int = 64
    micro_batch_size: int = 32
    seed: int = 1234
    log_interval: int = 10

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("train", self, "steps", "global_batch_size", "micro_batch_size", "log_interval")
        require(0 <= self.seed < 2**31, f"train.seed is {self.seed}: it must be at least 0 and below 2^31.")

    def accumulation(self, world_size: int) -> int:
        """Return the micro-batches that a rank runs a step; raise a `UserError` when they do not divide."""
        per_forward = self.micro_batch_size * world_size
        require(
            self.global_batch_size % per_forward == 0,
            f"train.global_batch_size = {self.global_batch_size} cannot be divided by train.micro_batch_size "
            f"x world size = {self.micro_batch_size} x {world_size} = {per_forward}: make it a multiple of "
            f"{per_forward}, or change train.micro_batch_size or the number of ranks.",
        )
        return self.global_batch_size // per_forward


@dataclass
class EngineConfig:
    """What executes the steps.

    Args:
        kind: deepspeed, or plain = one process of plain torch, for debugging.
        deepspeed_config: DeepSpeed JSON with ZeRO and communication settings (ds_configs/).
        device: auto = GPU where there is one.
        precision: auto = bf16 on GPUs, fp32 on CPUs.
    """

    kind: Literal["deepspeed", "plain"] = "deepspeed"
    deepspeed_config: str = "ds_configs/zero3.json"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


@dataclass
class CheckpointConfig:
    """When the run is saved.

    Args:
        interval: Steps between two checkpoints; the last step is always saved.
        keep: Newest checkpoints that are kept.
    """

    interval: int = 1000
    keep: int = 2

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require_positive("checkpoint", self, "interval", "keep")


@dataclass
class EvaluationConfig:
    """Held-out loss during training.

    Args:
        interval: Steps between two evaluations; 0 = none.
        samples: Validation samples used, at most; always the same ones under the same masks.
    """

    interval: int = 500
    samples: int = 512

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require(self.interval >= 0, f"evaluation.interval is {self.interval}: it must be 0 or more.")
        require_positive("evaluation", self, "samples")


@dataclass
class Config:
    """A run.

    Args:
        run_dir: Folder of checkpoints, TensorBoard events and the resolved configuration; a run that finds
            its checkpoints there goes on from the newest.
    """

    run_dir: str
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> None:
        """Raise a `UserError` for the first setting that cannot work."""
        require(bool(self.run_dir), "run_dir is empty: name the folder of the run.")
        for section in (self.data, self.model, self.objective, self.optimizer, self.train):
            section.check()
        self.schedule.check(self.train.steps)
        self.checkpoint.check()
        self.evaluation.check()


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Return every key of the configuration in dotted form, sections included."""
    keys = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            keys += known_keys(hints[item.name], prefix + item.name + ".")
    return keys


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file; raise a `UserError` naming the file and line otherwise."""
    require(path.is_file(), f"configuration {path} does not exist: give --config the path of a YAML file.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', error)}.") from None
    require(isinstance(tree, dict), f"{path} holds no settings: it must be a YAML mapping of sections.")
    return tree


def check_keys(keys: Sequence[str], where: str) -> None:
    """Raise a `UserError` with the nearest known key for the first unknown one."""
    known = known_keys()
    for key in keys:
        require(key in known, f"{where}: unknown key {key!r}.{nearest(key, known)}")


def build_parser() -> jsonargparse.ArgumentParser:
    """Return the command line of `pipeline.train`, with help from the docstrings above."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m pipeline.train",
        description="Pretrain a masked diffusion model; an interrupted run goes on by the same command.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the run (configs/).")
    parser.add_class_arguments(Config)
    return parser


def load(arguments: Sequence[str]) -> Config:
    """Return the checked configuration of a command line, ``--config X.yaml [--section.key value ...]``.

    Raises:
        UserError: for a missing or damaged file, an unknown key or a value that cannot work.
    """
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--config":
            value = value or "".join(arguments[position + 1 : position + 2])
            require(bool(value), "--config needs the path of a YAML file.")
            check_keys(list(flatten(read_yaml(Path(value)))), value)
        elif option.startswith("--") and option not in ("--help", "--print_config"):
            check_keys([option[2:].rstrip("+")], "command line")
    parser = build_parser()
    try:
        parsed = parser.parse_args(list(arguments))
    except jsonargparse.ArgumentError as error:
        raise UserError(_one_line(str(error))) from None
    config: Config = Config(**{k: v for k, v in parser.instantiate_classes(parsed).items() if k != "config"})
    config.check()
    return config


def _one_line(message: str) -> str:
    """Shorten jsonargparse's report of several lines to the key and what is wrong with it."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    return " ".join(lines[:3])


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `load` reads back to an equal `Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
