"""The plain engine: one process of plain torch, for debugging, and the oracle of sharded training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.base.traced import traced
from pipeline.config import Config
from pipeline.engine.ema import WeightAverage, file_name
from pipeline.engine.module import compile_parts, make_model, precision_of
from pipeline.engine.optimizer import (
    adamw_kernel,
    adamw_settings,
    hyper_parameters,
    is_muon,
    parameter_groups,
    set_hyper_parameters,
    set_learning_rate,
)
from pipeline.engine.protocol import FileLayout
from pipeline.engine.snapshot import HostCopy
from pipeline.engine.tensor_files import read_tensors, taking
from pipeline.engine.weights import Piece, StoredWeight, StoredWeights, copy_pieces, squared_norm
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.ranks import Ranks

PLAIN_FILE = "plain.pt"


class PlainEngine:
    """One process of plain torch, for debugging and as the oracle of sharded training; see `Engine`."""

    def __init__(self, config: Config, ranks: Ranks, vocabulary: Vocabulary) -> None:
        """Make model and optimizer."""
        if ranks.world_size > 1:
            raise UserError(
                f"engine.kind is 'plain' on {ranks.world_size} ranks: it runs in one process. Start one "
                "process, or set engine.kind to 'deepspeed'."
            )
        self.ranks = ranks
        self.precision = precision_of(config, ranks.device)
        self.sharding = "none"
        self.accumulation = config.train.accumulation(1)
        self.clip = config.optimizer.gradient_clip
        model = make_model(config, vocabulary).to(ranks.device)
        compile_parts(config, model, ranks.device)
        self.model: nn.Module = model
        groups = parameter_groups(self.model, config.optimizer)
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if not is_muon(group)],
            **adamw_settings(config.optimizer),
            **adamw_kernel(ranks.device),
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {"optimizer": self.optimizer}  # as in the file
        if matrices := [group for group in groups if is_muon(group)]:
            self.optimizers["muon"] = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
        self.host_copy = HostCopy()
        self.average: WeightAverage | None = None
        if config.optimizer.ema_decay is not None:
            weights = list(self.model.parameters())
            self.average = WeightAverage(config.optimizer.ema_decay, weights, self.pieces())

    def pieces(self) -> list[Piece]:
        """Return every parameter as one piece."""
        named = enumerate(self.model.named_parameters())
        return [Piece(name, tuple(p.shape), 0, number, 0, p.numel()) for number, (name, p) in named]

    def start_from(self, weights: StoredWeights) -> None:
        copy_pieces(weights, list(self.model.parameters()), self.pieces())
        if self.average is not None:
            self.average.restart()

    def begin_step(self, micro_batches: int) -> None:
        self.accumulation = micro_batches

    @traced("forward")
    def forward(self, batch: MaskedBatch) -> HeadOutput:
        """See `Engine`; bf16 is torch's autocast here."""
        enabled = self.precision == "bf16"
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=enabled):
            output: HeadOutput = self.model(batch)
        return output

    @traced("backward")
    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    @traced("update")
    def step(self, learning_rate: float, accept: Callable[[Tensor], bool] | None = None) -> Tensor:
        limit = self.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if accept is None or accept(norm):
            for optimizer in self.optimizers.values():
                set_learning_rate(optimizer, learning_rate)
                optimizer.step()
            if self.average is not None:
                self.average.update()
        self.model.zero_grad()
        return norm

    @torch.no_grad()
    def evaluate(self, batch: MaskedBatch) -> HeadOutput:
        return self.forward(batch)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        assert self.average is not None, "optimizer.ema_decay is not set"
        self.average.exchange()
        yield
        self.average.exchange()

    def squared_norm(self) -> Tensor:
        """See `Engine`; there is one rank."""
        return squared_norm(list(self.model.parameters()), self.pieces(), self.ranks.device)

    def take_communication_share(self) -> float | None:
        """See `Engine`; there is one rank."""
        return None

    def snapshot(self, folder: Path) -> dict[str, Any]:
        state = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state["model"] = self.model.state_dict()
        states: dict[str, Any] = {PLAIN_FILE: state}
        if self.average is not None:
            states[file_name(0)] = self.average.state_dict()
        return {name: self.host_copy(name, state) for name, state in states.items()}

    def load(self, folder: Path, layout: FileLayout, place: Path) -> None:
        # To the CPU: AdamW moves its step counters to where its kernel reads them, but never back.
        keys = ("model", *self.optimizers)
        path = folder / PLAIN_FILE
        state = read_tensors(path, keys, torch.device("cpu"), mmap=False)
        with taking(path):
            self.model.load_state_dict(state["model"])
            for name, optimizer in self.optimizers.items():
                settings = hyper_parameters(optimizer)
                optimizer.load_state_dict(state[name])
                set_hyper_parameters(optimizer, settings)
        if self.average is not None:
            self.average.load(folder, 0)

    def close(self) -> None:
        """See `Engine`."""


def open_plain_weights(folder: Path) -> StoredWeights | None:
    """Return the fp32 weights by name that a plain engine saved in `folder`, or None; nothing is read yet."""
    path = folder / PLAIN_FILE
    if not path.exists():
        return None
    return {name: StoredWeight.of(tensor) for name, tensor in read_tensors(path, ("model",))["model"].items()}
