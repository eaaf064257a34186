"""DeepSpeed's settings: ZeRO and communication from a JSON file, everything else from the run's YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.cli import UserError, nearest
from pipeline.config import Config
from pipeline.runtime import Launch

# DeepSpeed ignores an unknown top-level key in silence, so the known ones are listed here.
OWN_KEYS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "aio",
    "memory_breakdown",
    "wall_clock_breakdown",
    "dump_state",
    "checkpoint",
    "compile",
)
YAML_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clip",
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "bfloat16": "engine.precision",
    "torch_autocast": "engine.precision",
    "steps_per_print": "train.log_interval",
    "tensorboard": "train.log_interval",
    "activation_checkpointing": "engine.activation_checkpointing",
    "flops_profiler": "profiling.flops_step",
    "comms_logger": "profiling.communication_steps",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Return the ZeRO and communication settings of a DeepSpeed JSON file.

    Raises:
        UserError: for a missing or damaged file, a key that DeepSpeed does not know, or one whose place is
            the run's YAML.
    """
    if not path.is_file():
        raise UserError(f"engine.deepspeed_config: {path} does not exist; see ds_configs/.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold a JSON object.")
    for key in settings:
        if key in YAML_KEYS:
            raise UserError(f"{path}: {key!r} belongs to the run's YAML: remove it and set {YAML_KEYS[key]}.")
        if key not in OWN_KEYS:
            raise UserError(
                f"{path}: unknown key {key!r}, which DeepSpeed would ignore.{nearest(key, OWN_KEYS)}"
            )
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"{path}: zero_optimization.stage is {stage}: it must be 1, 2 or 3. For one process without ZeRO "
            "set engine.kind to 'plain'."
        )
    return settings


def complete_settings(settings: dict[str, Any], config: Config, launch: Launch) -> dict[str, Any]:
    """Return DeepSpeed's settings: those of the JSON file, and those that follow from the run's YAML."""
    return settings | {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.accumulation(launch.data_size),
        "gradient_clipping": config.optimizer.gradient_clip,
        "bf16": {"enabled": launch.precision == "bf16"},
        "steps_per_print": 2**31,
        # Its throughput timer would wait for the device at every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
