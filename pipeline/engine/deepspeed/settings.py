"""DeepSpeed's settings: ZeRO and communication from a JSON file, all others from the run's YAML."""

from __future__ import annotations

import contextlib
import json
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed.runtime.model_checkpointing.config import (
    CHECKPOINT_DEFAULT_DICT,
    get_checkpoint_writer_config,
)
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from pipeline.base.errors import UserError, nearest
from pipeline.config import Config
from pipeline.config.checks import require
from pipeline.engine.module import precision_of
from pipeline.model.transformer import Block
from pipeline.ranks import Ranks

# DeepSpeed silently ignores unknown top-level keys; these are the known ones.
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
    "compile": "engine.compile",
    "flops_profiler": "profiling.flops_step",
    "comms_logger": "profiling.communication_steps",
}


# Sections that DeepSpeed reads key by key, without a pydantic model.
DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")
# Of gradients: bf16 keeps 8 bits, so that a sum over many micro-batches or ranks loses the small ones.
GRADIENT_DTYPE = "fp32"
BLOCK = f"{Block.__module__}.{Block.__qualname__}"
CHECKPOINT = (*CHECKPOINT_DEFAULT_DICT, "load_universal", "use_node_local_storage", "parallel_write")
SECTIONS: dict[str, type[BaseModel] | Collection[str]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "aio": AIO_DEFAULT_DICT,
    "checkpoint": CHECKPOINT,
    "checkpoint.writer": get_checkpoint_writer_config({"writer": {}}),
    "checkpoint.parallel_write": ("pipeline_stage",),
    "data_types": DATA_TYPES,
}
STAGE_3_KEYS = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")


def read_settings(config: Config, world_size: int | None = None) -> dict[str, Any]:
    """Return the checked settings of the DeepSpeed JSON; see `pipeline.engine.build.engine_settings`."""
    settings = read_deepspeed_json(Path(config.engine.deepspeed_config))
    check_settings(settings, config, world_size)
    return settings


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Return the ZeRO and communication settings of a DeepSpeed JSON file.

    Raises:
        UserError: for a missing or damaged file, a key that DeepSpeed does not know or that belongs to the
            run's YAML, a value that DeepSpeed refuses, and settings that contradict each other.
    """
    if not path.is_file():
        raise UserError(
            f"engine.deepspeed_config: {path.absolute()} does not exist: start in the project's root, "
            "which has ds_configs/, or give the path of a DeepSpeed JSON."
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    require(isinstance(settings, dict), f"{path} must hold a JSON object.")
    for key in settings:
        if key in YAML_KEYS:
            raise UserError(f"{path}: {key!r} belongs to the run's YAML: remove it and set {YAML_KEYS[key]}.")
        if key not in OWN_KEYS:
            raise UserError(
                f"{path}: unknown key {key!r}, which DeepSpeed would ignore.{nearest(key, OWN_KEYS)}"
            )
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage not in (1, 2, 3):
        raise UserError(
            f"{path}: zero_optimization.stage is {stage}: it must be 1, 2 or 3. For one process without ZeRO "
            "set engine.kind to 'plain'."
        )
    for name, known in SECTIONS.items():
        section: Any = settings
        for part in name.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        if section is not None:
            _check_section(path, name, section, known)
    _check_zero(path, zero)
    return settings


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse duplicate keys, of which json silently takes the last."""
    for position, (key, _) in enumerate(pairs):
        if key in (before for before, _ in pairs[:position]):
            raise ValueError(f"{key!r} is given twice")
    return dict(pairs)


def _check_section(path: Path, name: str, section: Any, known: type[BaseModel] | Collection[str]) -> None:
    """Raise a `UserError` for the first unknown key or refused value of a section, at any depth."""
    require(isinstance(section, dict), f"{path}: {name} is {section!r}: it must be a JSON object.")
    if not isinstance(known, type):
        for key in section:
            require(
                key in known,
                f"{path}: unknown key '{name}.{key}', which DeepSpeed would ignore.{nearest(key, known)}",
            )
        return
    keys = _known_keys(known)
    for key, value in section.items():
        require(key in keys, f"{path}: unknown key '{name}.{key}'.{nearest(key, keys)}")
        nested = keys[key]
        if nested is not None and value is not None:
            _check_section(path, f"{name}.{key}", value, nested)
    try:
        known.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise UserError(f"{path}: {where} is {first['input']!r}: {first['msg']}.") from None
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: {name}: {error}.") from None


def _known_keys(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return the keys of a DeepSpeed section, with the models of those that are sections themselves."""
    keys: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, Mapping) and extra.get("deprecated"):
            continue
        choices = [field.annotation, *typing.get_args(field.annotation)]
        models = [kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)]
        keys[field.alias or name] = models[0] if models else None
    return keys


def offload_device(zero: Mapping[str, Any], part: str) -> str:
    """Return where zero_optimization puts "param" or "optimizer": "cpu", "nvme", or "none" for the GPU."""
    device: str = (zero.get(f"offload_{part}") or {}).get("device", "none")
    return device


def _check_zero(path: Path, zero: dict[str, Any]) -> None:
    """Raise a `UserError` for settings of zero_optimization without effect or in contradiction."""
    stage = zero["stage"]
    for key, value in zero.items():
        only_3 = key.startswith("stage3_") or (key in STAGE_3_KEYS and value not in (False, 0, 1))
        require(
            stage == 3 or not only_3,
            f"{path}: zero_optimization.{key} is {value}, which has no effect at stage {stage}: remove it, "
            "or set zero_optimization.stage to 3.",
        )
    for part in ("param", "optimizer"):
        offload, device = zero.get(f"offload_{part}") or {}, offload_device(zero, part)
        require(
            stage == 3 or part == "optimizer" or device == "none",
            f"{path}: zero_optimization.offload_param.device is {device!r} at stage {stage}: weights are "
            "offloaded at stage 3 alone. Set zero_optimization.stage to 3, or remove offload_param.",
        )
        require(
            device != "nvme" or stage == 3,
            f"{path}: zero_optimization.offload_{part}.device is 'nvme' at stage {stage}: NVMe needs "
            "stage 3. Set zero_optimization.stage to 3, or the device to 'cpu'.",
        )
        require(
            (device == "nvme") == (offload.get("nvme_path") is not None),
            f"{path}: zero_optimization.offload_{part}.device is {device!r} and its nvme_path "
            f"{offload.get('nvme_path')!r}: give a folder on a local disk with 'nvme', and none otherwise.",
        )
    param, optimizer = (offload_device(zero, part) for part in ("param", "optimizer"))
    require(
        param == "none" or optimizer != "none",
        f"{path}: zero_optimization.offload_param.device is {param!r} without offload_optimizer: the "
        "optimizer states take six times as much. Add offload_optimizer, or remove offload_param.",
    )


def check_settings(settings: Mapping[str, Any], config: Config, world_size: int | None = None) -> None:
    """Raise a `UserError` when DeepSpeed's settings contradict those of the run.

    Args:
        settings: of a DeepSpeed JSON, checked by `read_deepspeed_json`.
        config: the run.
        world_size: number of ranks, if known.
    """
    path, zero = config.engine.deepspeed_config, settings["zero_optimization"]
    for part in ("optimizer", "param"):
        if offload_device(zero, part) != "nvme":
            continue
        for key in ("optimizer.ema_decay", "train.initial_weights"):
            section, name = key.split(".")
            require(
                getattr(getattr(config, section), name) is None,
                f"{key} needs the weights in memory, but {path} has offload_{part}.device = 'nvme': set it "
                f"to 'cpu', or {key} to null.",
            )
    offload = offload_device(zero, "optimizer")
    require(
        config.optimizer.kind == "adamw" or offload == "none",
        f"optimizer.kind is {config.optimizer.kind!r}, but {path} has offload_optimizer.device = "
        f"{offload!r}: Muon multiplies matrices, for which a host is too slow. Remove offload_optimizer, or "
        "set optimizer.kind to 'adamw'.",
    )
    group = zero.get("zero_hpz_partition_size", 1)
    require(
        world_size is None or group <= 1 or world_size % group == 0,
        f"{path}: zero_optimization.zero_hpz_partition_size is {group}: it must divide the {world_size} "
        "ranks; the GPUs of a node are the usual choice.",
    )
    require(
        not (zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"))
        or (config.engine.device != "cpu" and config.engine.precision != "fp32"),
        f"{path}: zero_optimization.zero_quantized_weights or zero_quantized_gradients is true, but the run "
        f"is on engine.device = {config.engine.device!r} in engine.precision = {config.engine.precision!r}: "
        "quantised collectives need GPUs and bf16. Set them to false.",
    )
    dtype = settings.get("communication_data_type")
    require(
        dtype in (None, "fp32", "fp16", "bf16"),
        f"{path}: communication_data_type is {dtype!r}: it must be 'fp32', 'bf16' or 'fp16', or left out.",
    )
    dtype = settings.get("data_types", {}).get("grad_accum_dtype")
    require(
        dtype in (None, "fp32", "bf16"),
        f"{path}: data_types.grad_accum_dtype is {dtype!r}: it must be 'fp32' or 'bf16', or left out.",
    )
    may_be_bf16 = config.engine.precision == "bf16" or (
        config.engine.precision == "auto" and config.engine.device != "cpu"
    )
    require(
        zero["stage"] > 1 or dtype == "bf16" or not may_be_bf16,
        f"{path}: zero_optimization.stage is 1 in bf16 with gradients accumulated in fp32, for which "
        "DeepSpeed has an optimizer without the checks of a run. Set the stage to 2, engine.precision to "
        "'fp32', or data_types.grad_accum_dtype to 'bf16', which is less exact.",
    )
    require(
        dtype != "bf16" or config.engine.precision != "fp32",
        f"{path}: data_types.grad_accum_dtype is 'bf16', but engine.precision is 'fp32': remove the key, or "
        "set the precision to 'bf16'.",
    )


def compatible_ops(names: Sequence[str]) -> dict[str, bool]:
    """Return which of DeepSpeed's kernels can be compiled on this machine; DeepSpeed prints the obstacles."""
    with contextlib.redirect_stdout(sys.stderr):
        return {name: name in ALL_OPS and bool(ALL_OPS[name].is_compatible()) for name in names}


def complete_settings(settings: dict[str, Any], config: Config, ranks: Ranks) -> dict[str, Any]:
    """Return DeepSpeed's settings: those of the JSON, and those that follow from the run's YAML.

    Unless the JSON says otherwise, gradients are summed and accumulated in fp32, where DeepSpeed has the
    precision of the weights. Stage 3 gathers the weights of a whole block at a time, where DeepSpeed has
    those of each layer: a tenth of the hooks, fewer and larger collectives, and a block can be compiled.
    """
    zero = settings["zero_optimization"]
    if zero["stage"] == 3:
        # DeepSpeed's own product, which keeps no gathered weight alive, holds a different number in each
        # parameter. A compiled block would be compiled for each, and keeps none alive by itself.
        own_product = not config.engine.compile
        zero = {"leaf_module": {"classes": [BLOCK]}, "memory_efficient_linear": own_product} | zero
    defaults = {"communication_data_type": GRADIENT_DTYPE}
    own = {
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": GRADIENT_DTYPE} | settings.get("data_types", {}),
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.accumulation(ranks.data_size),
        "gradient_clipping": config.optimizer.gradient_clip,
        "bf16": {"enabled": precision_of(config, ranks.device) == "bf16"},
        "steps_per_print": 2**31,
        # DeepSpeed's throughput timer would wait for the device at every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    return defaults | settings | own
