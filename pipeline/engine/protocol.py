"""The seam between the training loop and what executes its steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pipeline.engine.weights import StoredWeights
from pipeline.model.batch import HeadOutput, MaskedBatch
from pipeline.ranks import Ranks


class FileLayout(NamedTuple):
    """How a snapshot is split into files.

    Attributes:
        sharding: none for the plain engine, or zero1, zero2 or zero3.
        world_size: ranks that wrote it.
    """

    sharding: str
    world_size: int


class Engine(Protocol):
    """Executes the steps. Nothing else knows how weights, gradients and optimizer states are sharded.

    Every rank calls every method, in the same order.

    Attributes:
        ranks: this process among its peers.
        sharding: see `FileLayout`.
    """

    ranks: Ranks
    sharding: str

    def start_from(self, weights: StoredWeights) -> None:
        """Replace the initial weights, before the first step.

        Raises:
            UserError: for a weight that is missing or has the wrong shape.
        """

    def begin_step(self, micro_batches: int) -> None:
        """Say, before a step, how many micro-batches it has: the gradient is their mean."""

    def forward(self, batch: MaskedBatch) -> HeadOutput:
        """Run the model on a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch's loss, which is a mean over its sequences."""

    def step(self, learning_rate: float, accept: Callable[[Tensor], bool] | None = None) -> Tensor:
        """Update the weights by the mean gradient; return its global norm [] before clipping.

        Args:
            learning_rate: of this step.
            accept: decides by the norm whether to update; all ranks must agree. A refused step leaves
                weights, optimizer state and average untouched, bit for bit.
        """

    def evaluate(self, batch: MaskedBatch) -> HeadOutput:
        """Run the model without gradients."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Use the moving average of the weights inside the block; requires ``optimizer.ema_decay``."""

    def squared_norm(self) -> Tensor:
        """Return this rank's share [] of the squared norm of the weights, float64; NaN for weights on NVMe.

        The shares of all ranks add up to the squared norm of the whole model.
        """

    def take_communication_share(self) -> float | None:
        """Return the share of time in collectives, once after ``profiling.communication_steps`` steps.

        Those steps wait for the device at every collective, so nothing overlaps: the share is an upper bound.
        """

    def snapshot(self, folder: Path) -> dict[str, Any]:
        """Copy this rank's weights and optimizer state to host memory; training does not change the copy.

        Args:
            folder: existing folder, for states too large for host memory (offloaded to NVMe).

        Returns:
            What torch.save is to write, by file name in `folder`. The next snapshot overwrites it.
        """

    def load(self, folder: Path, layout: FileLayout, place: Path) -> None:
        """Resume from the files of a snapshot.

        Args:
            folder: folder of the files.
            layout: of the files. One of another ZeRO stage or world size than this engine's is converted
                first.
            place: folder in which a conversion is kept for the next load.

        Raises:
            UserError: for files that cannot be converted.
        """

    def close(self) -> None:
        """Release what the engine holds."""
