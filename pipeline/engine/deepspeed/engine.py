"""Training by DeepSpeed: ZeRO shards weights, gradients and optimizer states over the ranks."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.base.traced import traced
from pipeline.config import Config
from pipeline.engine.deepspeed.checkpointing import (
    TAG,
    SnapshotWriter,
    check_complete,
    check_files,
    make_universal,
)
from pipeline.engine.deepspeed.muon import ShardedMuon
from pipeline.engine.deepspeed.private import (
    allow_optimizer,
    check_names,
    find_shards,
    forget_powers,
    import_muon_uncompiled,
    keeping_gradient_clip,
    leave_out_op,
    loading_universal,
    without_foreign_code,
)
from pipeline.engine.deepspeed.profiling import Profiler
from pipeline.engine.deepspeed.settings import complete_settings, offload_device, read_settings
from pipeline.engine.deepspeed.ulysses import UlyssesSequence
from pipeline.engine.ema import WeightAverage, file_name
from pipeline.engine.module import compile_parts, make_model
from pipeline.engine.optimizer import (
    adamw_kernel,
    adamw_settings,
    hyper_parameters,
    is_hidden_matrix,
    parameter_groups,
    set_hyper_parameters,
    set_learning_rate,
)
from pipeline.engine.protocol import FileLayout
from pipeline.engine.weights import StoredWeights, copy_pieces, squared_norm
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.model.sequence import WHOLE
from pipeline.ranks import Ranks

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It serves inference only, but every CPU run would compile it at its start, and a compiler may be missing.
leave_out_op("deepspeed_shm_comm")


class DeepSpeedEngine:
    """The engine of real runs; see `pipeline.engine.protocol.Engine` for the methods."""

    def __init__(self, config: Config, ranks: Ranks, vocabulary: Vocabulary) -> None:
        """Make the model, in shards under ZeRO-3 (zero.Init), and its optimizer."""
        # DeepSpeed still calls collectives by the names that torch is renaming.
        warnings.filterwarnings("ignore", ".*(reduce_scatter_tensor|all_gather_into_tensor).*deprecated")
        self.ranks = ranks
        path = Path(config.engine.deepspeed_config)
        settings = complete_settings(read_settings(config, ranks.world_size), config, ranks)
        self.zero = zero = settings["zero_optimization"]
        limit = config.watchdog.collective_limit
        deepspeed.init_distributed(ranks.backend, auto_mpi_discovery=False, verbose=False, timeout=limit)
        sequence = UlyssesSequence(ranks.sequence_size) if ranks.sequence_size > 1 else WHOLE
        import_muon_uncompiled()
        try:
            with deepspeed.zero.Init(config_dict_or_path=settings, enabled=zero.get("stage") == 3):
                model = make_model(config, vocabulary, sequence)
            compile_parts(config, model, ranks.device)
            self.names = {parameter: name for name, parameter in model.named_parameters()}
            optimizer = self._make_optimizer(config, model)
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            raise UserError(f"{path}: DeepSpeed refuses these settings: {error}") from error
        check_names(self.engine, zero["stage"])
        self.profiler = Profiler(config, self.engine)
        self.snapshots = SnapshotWriter(self.engine)
        self.sharding = f"zero{self.engine.zero_optimization_stage()}"
        self.shards = find_shards(self.engine.optimizer, zero["stage"])
        self.shards.judge(self._accept)
        self.muon = optimizer if isinstance(optimizer, ShardedMuon) else None
        if self.muon is not None:
            pieces = [p for p in self.shards.pieces(self.names) if is_hidden_matrix(p.name)]
            self.muon.assign(self.shards.weights(), ranks.all_gather(pieces), ranks.rank)
        self.average: WeightAverage | None = None
        if config.optimizer.ema_decay is not None:
            weights, pieces = self.shards.weights(), self.shards.pieces(self.names)
            self.average = WeightAverage(config.optimizer.ema_decay, weights, pieces)

    def _make_optimizer(self, config: Config, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer that DeepSpeed is to run on its shards."""
        groups, arguments = parameter_groups(model, config.optimizer), adamw_settings(config.optimizer)
        if offload_device(self.zero, "optimizer") != "none":
            offloaded = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **arguments)
            forget_powers(offloaded)
            return offloaded
        arguments |= adamw_kernel(self.ranks.device)
        if config.optimizer.kind == "muon":
            allow_optimizer(ShardedMuon)
            return ShardedMuon(groups, **arguments)
        return torch.optim.AdamW(groups, **arguments)

    def _on_nvme(self) -> bool:
        """Return whether weights or optimizer states are offloaded to NVMe."""
        return "nvme" in (offload_device(self.zero, part) for part in ("optimizer", "param"))

    def start_from(self, weights: StoredWeights) -> None:
        """See `Engine`; each rank reads the parts that it holds."""
        copy_pieces(weights, self.shards.weights(), self.shards.pieces(self.names))
        self.shards.publish()
        if self.average is not None:
            self.average.restart()

    def begin_step(self, micro_batches: int) -> None:
        """See `Engine`; DeepSpeed tells the last micro-batch by the number of those before it."""
        before = self.engine.gradient_accumulation_steps()
        if micro_batches != before:
            self.engine.set_train_batch_size(self.engine.train_batch_size() // before * micro_batches)
            self.engine.micro_steps = 0

    @traced("forward")
    def forward(self, batch: MaskedBatch) -> HeadOutput:
        with self.profiler.forward():
            output: HeadOutput = self.engine(batch)
        return output

    @traced("backward")
    def backward(self, loss: Tensor) -> None:
        """See `Engine`; DeepSpeed counts micro-batches by the calls of its step."""
        # DeepSpeed averages over all ranks, but those of a sequence-parallel group share one loss.
        self.engine.backward(loss * self.ranks.sequence_size)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    @traced("update")
    def step(self, learning_rate: float, accept: Callable[[Tensor], bool] | None = None) -> Tensor:
        self.accept = accept
        set_learning_rate(self.engine.optimizer, learning_rate)
        self.engine.step()
        if self.average is not None and self.engine.was_step_applied():
            self.average.update()
        self.profiler.end_step()
        return self.norm

    def _accept(self, norm: Tensor) -> bool:
        """Decide for DeepSpeed whether to update the weights."""
        self.norm = norm.to(self.ranks.device)  # on the CPU for offloaded gradients
        return self.accept is None or self.accept(self.norm)

    @torch.no_grad()
    def evaluate(self, batch: MaskedBatch) -> HeadOutput:
        self.engine.eval()
        output: HeadOutput = self.engine(batch)
        self.engine.train()
        return output

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        assert self.average is not None, "optimizer.ema_decay is not set"
        self.average.exchange()
        self.shards.publish()
        yield
        self.average.exchange()
        self.shards.publish()

    def squared_norm(self) -> Tensor:
        if self._on_nvme():
            return torch.full((), torch.nan, dtype=torch.float64, device=self.ranks.device)
        return squared_norm(self.shards.weights(), self.shards.pieces(self.names), self.ranks.device)

    def take_communication_share(self) -> float | None:
        share, self.profiler.communication_share = self.profiler.communication_share, None
        return share

    def snapshot(self, folder: Path) -> dict[str, Any]:
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self.average is not None:
            self.snapshots.keep(file_name(self.ranks.rank), self.average.state_dict())
        return self.snapshots.take()

    def load(self, folder: Path, layout: FileLayout, place: Path) -> None:
        settings = hyper_parameters(self.engine.optimizer)
        with self.ranks.agreeing():
            check_complete(folder, layout)
        check_files(folder, self.ranks)
        with keeping_gradient_clip(self.engine):
            if layout == (self.sharding, self.ranks.world_size):
                with without_foreign_code():
                    path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
            else:
                universal = make_universal(folder, place, self.ranks)
                check_files(universal, self.ranks)
                with without_foreign_code(), loading_universal(self.engine):
                    path, _ = self.engine.load_checkpoint(str(universal), tag=TAG)
        if path is None:
            raise UserError(f"{folder} holds no DeepSpeed checkpoint: remove it to resume from an older one.")
        set_hyper_parameters(self.engine.optimizer, settings)
        if self.muon is not None:
            self.muon.drop_second_moments()
        if self.average is not None:
            with self.ranks.agreeing():  # each rank reads files of its own
                self.average.load(folder, self.ranks.rank)

    def close(self) -> None:
        self.engine.destroy()
