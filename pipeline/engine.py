"""DeepSpeed: the one module that imports it. ZeRO shards weights, gradients and optimizer states."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from pipeline.cli import UserError, nearest
from pipeline.config import Config
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.optimizer import adamw_settings, parameter_groups
from pipeline.runtime import Launch, make_model

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Serves inference only, and would be compiled at the start of every CPU run: a compiler may be missing.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TAG = "model"

# DeepSpeed ignores an unknown top-level key in silence, so the known ones are listed here.
OWN_KEYS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "activation_checkpointing",
    "flops_profiler",
    "comms_logger",
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
    return settings


def complete_settings(settings: dict[str, Any], config: Config, launch: Launch) -> dict[str, Any]:
    """Return DeepSpeed's settings: those of the JSON file, and those that follow from the run's YAML."""
    return settings | {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.accumulation(launch.world_size),
        "gradient_clipping": config.optimizer.gradient_clip,
        "bf16": {"enabled": launch.precision == "bf16"},
        "steps_per_print": 2**31,
        # Its throughput timer would wait for the device at every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }


class DeepSpeedEngine:
    """The Engine of every real run; see `pipeline.runtime.Engine` for the methods."""

    def __init__(self, config: Config, launch: Launch, vocabulary: Vocabulary) -> None:
        """Join the process group, make the model in shards (zero.Init) and its optimizer."""
        # DeepSpeed still calls collectives by the names that torch is renaming.
        warnings.filterwarnings("ignore", ".*(reduce_scatter_tensor|all_gather_into_tensor).*deprecated")
        self.launch = launch
        path = Path(config.engine.deepspeed_config)
        settings = complete_settings(read_deepspeed_json(path), config, launch)
        zero = settings.get("zero_optimization", {})
        if not torch.distributed.is_initialized():
            backend = "nccl" if launch.device.type == "cuda" else "gloo"
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        try:
            with deepspeed.zero.Init(config_dict_or_path=settings, enabled=zero.get("stage") == 3):
                model = make_model(config, vocabulary)
            offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
            adamw = deepspeed.ops.adam.DeepSpeedCPUAdam if offload else torch.optim.AdamW
            optimizer = adamw(parameter_groups(model, config.optimizer), **adamw_settings(config.optimizer))
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            raise UserError(f"{path}: DeepSpeed refuses these settings: {error}") from error

    def forward(self, batch: MaskedBatch) -> HeadOutput:
        """See `Engine`."""
        output: HeadOutput = self.engine(batch)
        return output

    def backward(self, loss: Tensor) -> None:
        """See `Engine`; DeepSpeed counts micro-batches by its own calls of step."""
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, learning_rate: float) -> Tensor | float:
        """See `Engine`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm: Tensor | float = self.engine.get_global_grad_norm()
        return norm

    @torch.no_grad()
    def evaluate(self, batch: MaskedBatch) -> HeadOutput:
        """See `Engine`."""
        self.engine.eval()
        output: HeadOutput = self.engine(batch)
        self.engine.train()
        return output

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """See `Engine`."""
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def barrier(self) -> None:
        """See `Engine`."""
        torch.distributed.barrier()

    def save(self, folder: Path) -> None:
        """See `Engine`."""
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise UserError(f"{folder} holds no DeepSpeed checkpoint: remove it to go on from an older one.")

    def close(self) -> None:
        """See `Engine`."""
        self.engine.destroy()
        torch.distributed.destroy_process_group()


def read_sharded_weights(folder: Path) -> dict[str, Tensor]:
    """Return the fp32 weights that `DeepSpeedEngine.save` wrote, put together on the CPU by this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
