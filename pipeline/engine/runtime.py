"""What executes the steps of a run: the Engine seam, the plain engine, the weights that either has saved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.config import Config
from pipeline.engine.ema import WeightAverage, file_name, open_average
from pipeline.engine.optimizer import adamw_settings, hyper_parameters, parameter_groups, set_hyper_parameters
from pipeline.engine.snapshot import HostCopy
from pipeline.engine.weights import Piece, StoredWeight, StoredWeights, copy_pieces, squared_norm
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.model.sequence import WHOLE, WholeSequence
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.ranks import Launch, free_port

T = TypeVar("T")


class Engine(Protocol):
    """What executes the steps: nothing else knows how weights, gradients and states are sharded.

    Attributes:
        launch: this process among its peers.
        sharding: how a snapshot is cut into files: none, zero1, zero2 or zero3.
    """

    launch: Launch
    sharding: str

    def start_from(self, weights: StoredWeights) -> None:
        """Put these in place of the initial weights; called by every rank before the first step.

        Raises:
            UserError: for a weight that is missing or of another shape.
        """

    def forward(self, batch: MaskedBatch) -> HeadOutput:
        """Run the model on a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss, which is a mean over its sequences."""

    def step(self, learning_rate: float, accept: Callable[[Tensor], bool] | None = None) -> Tensor:
        """Update the weights with the mean gradient, and return its global norm [] before clipping.

        Args:
            learning_rate: of this step.
            accept: asked with the norm whether to update. A refused step leaves weights, optimizer state and
                average exactly as they were. All ranks must answer alike.
        """

    def evaluate(self, batch: MaskedBatch) -> HeadOutput:
        """Run the model without gradients."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Compute with the moving average of the weights inside the block; ``optimizer.ema_decay`` is set."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the element-wise sum of `values` over all ranks."""

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum of `values` over all ranks; NaN need not survive it."""

    def squared_norm(self) -> Tensor:
        """Return this rank's share [] of the squared norm of the weights, float64; NaN for weights on NVMe.

        The sum over the ranks is that of the whole model, each weight counted once.
        """

    def take_communication_share(self) -> float | None:
        """Return, once after the steps of ``profiling.communication_steps``, their share in collectives.

        Those steps wait for the device at every collective, so nothing overlaps: it is an upper bound.
        """

    def barrier(self) -> None:
        """Wait until every rank has come here."""

    def all_gather(self, value: T) -> list[T]:
        """Return the picklable `value` of every rank, in rank order."""

    def snapshot(self, folder: Path) -> dict[str, Any]:
        """Return this rank's weights and optimizer state in host memory; called by every rank.

        They stay as they are until the next snapshot, whatever is trained meanwhile.

        Args:
            folder: an existing folder for what is too large for host memory (states offloaded to NVMe).

        Returns:
            What is to be written by torch.save, by the names of files below `folder`.
        """

    def load(self, folder: Path, world_size: int) -> None:
        """Go on from the files of a snapshot; called by every rank.

        Args:
            folder: where the files are.
            world_size: ranks that wrote them, under the same sharding. Another number than now costs a
                conversion, which is kept beside the checkpoint.

        Raises:
            UserError: for files that cannot be converted.
        """

    def close(self) -> None:
        """Leave the process group."""


class Gathers(Protocol):
    """Processes that can tell each other something."""

    def all_gather(self, value: T) -> list[T]:
        """Return the picklable `value` of every rank, in rank order."""


def agree(ranks: Gathers, problem: str | None) -> None:
    """Raise a `UserError` on every rank when `problem` is not None on one; called by every rank.

    What one rank alone finds wrong must stop all of them: the others would wait for it for ever.
    """
    found = [each for each in ranks.all_gather(problem) if each is not None]
    if found:
        raise UserError(found[0])


def make_model(
    config: Config, vocabulary: Vocabulary, sequence: WholeSequence = WHOLE
) -> MaskedDiffusionModel:
    """Return the model with initial weights drawn from the run's seed, computing what `sequence` says."""
    torch.manual_seed(config.train.seed)
    recompute = config.engine.activation_checkpointing
    return MaskedDiffusionModel(config.model, vocabulary, recompute, sequence)


def compile_blocks(config: Config, model: MaskedDiffusionModel, device: torch.device) -> None:
    """Compile each transformer block where ``engine.compile`` asks for it, at its first use.

    The blocks are the same code, so that one program serves all of them, and they stay where they are: the
    names of the weights do not change. There is a program for each kind of mask, for training and evaluation,
    for the first shape and for any other; beyond torch's limit of 8, blocks run as they are.

    Raises:
        UserError: where there is no compiler.
    """
    if not config.engine.compile:
        return
    variable, compiler = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")
    name = os.environ.get(variable, compiler)
    if shutil.which(name) is None:
        raise UserError(
            f"engine.compile is true, but there is no {name} on the PATH, which torch.compile needs: install "
            f"it, name another in {variable}, or set engine.compile to false."
        )
    for block in model.model.layers:
        block.compile()


def build_engine(config: Config, launch: Launch, vocabulary: Vocabulary) -> Engine:
    """Return the configured engine around a new model.

    Raises:
        UserError: for a plain engine on several ranks, or DeepSpeed settings that cannot work.
    """
    if config.engine.kind == "plain":
        return PlainEngine(config, launch, vocabulary)
    engine: Engine = _deepspeed().DeepSpeedEngine(config, launch, vocabulary)
    return engine


def engine_settings(config: Config, world_size: int | None = None) -> dict[str, Any]:
    """Return the settings of DeepSpeed's JSON, checked with those of the run; none for the plain engine.

    Args:
        config: the run.
        world_size: ranks, where they are known already.

    Raises:
        UserError: for a file that is missing, or settings that cannot work.
    """
    if config.engine.kind == "plain":
        return {}
    engine = _deepspeed()
    settings: dict[str, Any] = engine.read_deepspeed_json(Path(config.engine.deepspeed_config))
    engine.check_settings(settings, config, world_size)
    return settings


def compatible_ops(names: Sequence[str]) -> dict[str, bool]:
    """Say which of DeepSpeed's kernels can be compiled on this machine."""
    compatible: dict[str, bool] = _deepspeed().compatible_ops(names)
    return compatible


def _deepspeed() -> ModuleType:
    """Import DeepSpeed's side only where it is needed: plain runs start faster without."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from pipeline.engine import deepspeed as engine

    return engine


class PlainEngine:
    """One process of plain torch: for debugging, and the oracle that sharded training is compared with."""

    def __init__(self, config: Config, launch: Launch, vocabulary: Vocabulary) -> None:
        """Make model and optimizer; see `build_engine`."""
        if launch.world_size > 1:
            raise UserError(
                f"engine.kind is 'plain' on {launch.world_size} ranks: it runs in one process. Start one "
                "process, or set engine.kind to 'deepspeed'."
            )
        self.launch = launch
        self.sharding = "none"
        self.accumulation = config.train.accumulation(1)
        # megatron-core's blends ask torch.distributed for the rank, also where there is one alone.
        address = f"tcp://127.0.0.1:{free_port()}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
        self.clip = config.optimizer.gradient_clip
        model = make_model(config, vocabulary).to(launch.device)
        compile_blocks(config, model, launch.device)
        self.model: nn.Module = model
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.optimizer), **adamw_settings(config.optimizer)
        )
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
        """See `Engine`."""
        copy_pieces(weights, list(self.model.parameters()), self.pieces())
        if self.average is not None:
            self.average.restart()

    def forward(self, batch: MaskedBatch) -> HeadOutput:
        """See `Engine`; bf16 is torch's autocast here."""
        enabled = self.launch.precision == "bf16"
        with torch.autocast(self.launch.device.type, torch.bfloat16, enabled=enabled):
            output: HeadOutput = self.model(batch)
        return output

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        (loss / self.accumulation).backward()

    def step(self, learning_rate: float, accept: Callable[[Tensor], bool] | None = None) -> Tensor:
        """See `Engine`."""
        limit = self.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if accept is None or accept(norm):
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def evaluate(self, batch: MaskedBatch) -> HeadOutput:
        """See `Engine`."""
        return self.forward(batch)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """See `Engine`."""
        assert self.average is not None, "optimizer.ema_decay is not set"
        self.average.exchange()
        yield
        self.average.exchange()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """See `Engine`; there is one rank."""
        return values

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """See `Engine`; there is one rank."""
        return values

    def squared_norm(self) -> Tensor:
        """See `Engine`; there is one rank."""
        return squared_norm(list(self.model.parameters()), self.pieces(), self.launch.device)

    def take_communication_share(self) -> float | None:
        """See `Engine`; there is one rank."""
        return None

    def barrier(self) -> None:
        """See `Engine`; there is one rank."""

    def all_gather(self, value: T) -> list[T]:
        """See `Engine`; there is one rank."""
        return [value]

    def snapshot(self, folder: Path) -> dict[str, Any]:
        """See `Engine`."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        states: dict[str, Any] = {PLAIN_FILE: state}
        if self.average is not None:
            states[file_name(0)] = self.average.state_dict()
        return {name: self.host_copy(name, state) for name, state in states.items()}

    def load(self, folder: Path, world_size: int) -> None:
        """See `Engine`."""
        state = torch.load(folder / PLAIN_FILE, map_location=self.launch.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        settings = hyper_parameters(self.optimizer)
        self.optimizer.load_state_dict(state["optimizer"])
        set_hyper_parameters(self.optimizer, settings)
        if self.average is not None:
            self.average.load(folder, 0)

    def close(self) -> None:
        """See `Engine`."""
        torch.distributed.destroy_process_group()


PLAIN_FILE = "plain.pt"


def open_weights(folder: Path, averaged: bool = False) -> StoredWeights:
    """Return the fp32 weights by name that an engine of either kind saved in `folder`, still on the disk.

    Args:
        folder: where the files of `Engine.snapshot` are, written at any number of ranks.
        averaged: the moving average of the weights instead (`ema.has_average` says whether there is one).
    """
    if averaged:
        return open_average(folder)
    if (folder / PLAIN_FILE).exists():
        state = torch.load(folder / PLAIN_FILE, map_location="cpu", mmap=True, weights_only=True)
        return {name: StoredWeight.of(tensor) for name, tensor in state["model"].items()}
    weights: StoredWeights = _deepspeed().open_sharded_weights(folder)
    return weights


def read_weights(folder: Path, averaged: bool = False) -> dict[str, Tensor]:
    """Return all of `open_weights`, on the CPU."""
    return {name: weight.read() for name, weight in open_weights(folder, averaged).items()}
