"""The seam between the training loop and what executes its steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pipeline.engine.weights import StoredWeights
from pipeline.model.batch import HeadOutput, MaskedBatch
from pipeline.ranks import Ranks


class Engine(Protocol):
    """What executes the steps: nothing else knows how weights, gradients and states are sharded.

    Attributes:
        ranks: this process among its peers.
        sharding: how a snapshot is cut into files: none, zero1, zero2 or zero3.
    """

    ranks: Ranks
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

    def squared_norm(self) -> Tensor:
        """Return this rank's share [] of the squared norm of the weights, float64; NaN for weights on NVMe.

        The sum over the ranks is that of the whole model, each weight counted once.
        """

    def take_communication_share(self) -> float | None:
        """Return, once after the steps of ``profiling.communication_steps``, their share in collectives.

        Those steps wait for the device at every collective, so nothing overlaps: it is an upper bound.
        """

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
        """Give up what the engine holds; nothing can be trained afterwards."""
