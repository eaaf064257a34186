"""Training by DeepSpeed: ZeRO shards weights, gradients and optimizer states over the ranks."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from pipeline.cli import UserError
from pipeline.config import Config
from pipeline.ema import WeightAverage, file_name
from pipeline.engine.profiling import Profiler
from pipeline.engine.settings import complete_settings, read_deepspeed_json
from pipeline.engine.shards import find_shards
from pipeline.engine.ulysses import UlyssesSequence
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.model.sequence import WHOLE
from pipeline.optimizer import adamw_settings, parameter_groups
from pipeline.runtime import Launch, make_model
from pipeline.weights import StoredWeight, StoredWeights

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Serves inference only, and would be compiled at the start of every CPU run: a compiler may be missing.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TAG = "model"


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
        sequence = UlyssesSequence(launch.sequence_size) if launch.sequence_size > 1 else WHOLE
        try:
            with deepspeed.zero.Init(config_dict_or_path=settings, enabled=zero.get("stage") == 3):
                model = make_model(config, vocabulary, sequence)
            names = {parameter: name for name, parameter in model.named_parameters()}
            offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
            adamw = deepspeed.ops.adam.DeepSpeedCPUAdam if offload else torch.optim.AdamW
            optimizer = adamw(parameter_groups(model, config.optimizer), **adamw_settings(config.optimizer))
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            raise UserError(f"{path}: DeepSpeed refuses these settings: {error}") from error
        self.profiler = Profiler(config, self.engine)
        self.average: WeightAverage | None = None
        if config.optimizer.ema_decay is not None:
            self.shards = find_shards(self.engine.optimizer, zero.get("stage", 0), str(path))
            weights, pieces = self.shards.weights(), self.shards.pieces(names)
            self.average = WeightAverage(config.optimizer.ema_decay, weights, pieces)

    def forward(self, batch: MaskedBatch) -> HeadOutput:
        """See `Engine`."""
        with self.profiler.forward():
            output: HeadOutput = self.engine(batch)
        return output

    def backward(self, loss: Tensor) -> None:
        """See `Engine`; DeepSpeed counts micro-batches by its own calls of step."""
        # The mean is over all ranks, and the ranks of a sequence-parallel group have one loss among them.
        self.engine.backward(loss * self.launch.sequence_size)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, learning_rate: float) -> Tensor | float:
        """See `Engine`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        if self.average is not None and self.engine.was_step_applied():
            self.average.update()
        norm: Tensor | float = self.engine.get_global_grad_norm()
        self.profiler.end_step()
        return norm

    @torch.no_grad()
    def evaluate(self, batch: MaskedBatch) -> HeadOutput:
        """See `Engine`."""
        self.engine.eval()
        output: HeadOutput = self.engine(batch)
        self.engine.train()
        return output

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """See `Engine`."""
        assert self.average is not None, "optimizer.ema_decay is not set"
        self.average.exchange()
        self.shards.publish()
        yield
        self.average.exchange()
        self.shards.publish()

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
        if self.average is not None:
            torch.save(self.average.state_dict(), folder / file_name(self.launch.rank))

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise UserError(f"{folder} holds no DeepSpeed checkpoint: remove it to go on from an older one.")
        if self.average is not None:
            self.average.load(folder, self.launch.rank)

    def close(self) -> None:
        """See `Engine`."""
        self.engine.destroy()
        torch.distributed.destroy_process_group()


def open_sharded_weights(folder: Path) -> StoredWeights:
    """Return the fp32 weights that `DeepSpeedEngine.save` wrote, put together one by one as they are read.

    Only what is read comes into memory; but ZeRO 1 and 2 cut through parameters: DeepSpeed joins all at once.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG, lazy_mode=True)
    return {
        name.removeprefix("module."): StoredWeight(tuple(value.shape), value.contiguous)
        for name, value in state.items()
    }
