"""The guard skips updates with a non-finite or spiking loss or gradient norm, on all ranks.

Before an update all ranks exchange one small tensor: the worst loss of any micro-batch, and whether a rank
was asked to stop. The gradient norm is already global. So all ranks decide by the same numbers. Reading them
on the host adds no sync, because DeepSpeed waits for the norm there anyway.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pipeline.config import GuardConfig
from pipeline.ranks import Ranks
from pipeline.resilience.stop import Stop

WINDOW = 128  # past steps that a new step is compared with
FEWEST = 32  # with fewer past steps, only non-finite values are refused
_MAD_TO_DEVIATION = 1.4826  # standard deviation of a normal distribution in units of its MAD
_LEAST_DEVIATION = 0.1  # lower bound for gradient norms, as a share of the median
_LEAST_JUMP = 1.0  # nats, lower bound for losses: near 0 any change is many deviations


@dataclass
class Window:
    """Statistics of the past steps that the next step is compared with.

    Attributes:
        losses: the worst micro-batch loss of each step, nats.
        norms: the gradient norm of each step.
        in_a_row: consecutive refused steps, up to the last step.
    """

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    in_a_row: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the window as JSON values, for the checkpoint."""
        return {"losses": list(self.losses), "norms": list(self.norms), "in_a_row": self.in_a_row}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Load the values of `to_json`; an empty mapping gives an empty window."""
        self.losses, self.norms = (deque(values.get(name, []), WINDOW) for name in ("losses", "norms"))
        self.in_a_row = values.get("in_a_row", 0)  # missing in older checkpoints


class Guard:
    """Judges each step before its update.

    Attributes:
        window: the past steps.
        problem: why the last step was refused; None if it was accepted.
    """

    def __init__(
        self,
        config: GuardConfig,
        gradient_clip: float,
        window: Window | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Create the guard.

        Args:
            config: the limits.
            gradient_clip: ``optimizer.gradient_clip``; a norm below it is never a spike.
            window: past steps; empty by default.
            stop: the stop request, exchanged together with the losses.
        """
        self.config = config
        self.gradient_clip = gradient_clip
        self.window = window or Window()
        self.stop = stop
        self.problem: str | None = None

    def forget(self) -> None:
        """Clear the history, for example when the objective or the data mix changes."""
        self.window.losses.clear()
        self.window.norms.clear()

    def watch(self, ranks: Ranks, losses: Tensor) -> Callable[[Tensor], bool]:
        """Exchange the losses of a step; every rank calls this after its last backward.

        Args:
            ranks: the ranks.
            losses: this rank's loss of each micro-batch [G].

        Returns:
            A function of the global gradient norm [] that returns whether to update the weights.
        """
        worst = torch.nan_to_num(losses.detach().double(), math.inf, math.inf, math.inf).max()
        facts = torch.stack(
            [worst, worst.new_full((), float(self.stop is not None and self.stop.requested()))]
        )
        agreed = ranks.max(facts)

        def accept(norm: Tensor) -> bool:
            loss, stop, size = torch.cat([agreed, norm.double().reshape(1)]).tolist()
            if self.stop is not None:
                self.stop.agreed = bool(stop)
            return self.judge(loss, size)

        return accept

    def judge(self, loss: float, norm: float) -> bool:
        """Return whether to accept a step with this worst loss (nats) and gradient norm; record it."""
        norm = norm if norm >= 0 else math.inf  # DeepSpeed returns -1 for a non-finite norm
        self.problem = self._problem(loss, norm)
        for history, value in ((self.window.losses, loss), (self.window.norms, norm)):
            if math.isfinite(value):  # spikes too, so that a lasting change of level is accepted in the end
                history.append(value)
        if self.problem is None:
            self.window.in_a_row = 0
        else:
            self.window.in_a_row += 1
        return self.problem is None

    def _problem(self, loss: float, norm: float) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is not finite"
        if self.config.spike_limit == 0:
            return None
        highest = self._highest(self.window.losses, least_jump=_LEAST_JUMP)
        if loss > highest:
            return f"the loss of a micro-batch is {loss:.4g}, above {highest:.4g}"
        highest = max(self._highest(self.window.norms, least_deviation=_LEAST_DEVIATION), self.gradient_clip)
        if norm <= highest:
            return None
        if self.gradient_clip and self.window.in_a_row + 1 >= max(2, self.config.skips_before_rollback):
            # Large norms with a normal loss on every batch come from the weights, not from the examples.
            # Skipping does not change the weights; clipped steps do.
            self.window.norms.clear()
            return None
        return f"the gradient norm is {norm:.4g}, above {highest:.4g}"

    def _highest(self, history: deque[float], least_jump: float = 0.0, least_deviation: float = 0.0) -> float:
        """Return the largest accepted value; `least_deviation` is a share of the median."""
        if len(history) < FEWEST:
            return math.inf
        middle = median(history)
        deviation = max(_deviation(history), least_deviation * middle)
        return middle + max(self.config.spike_limit * deviation, least_jump)


def _deviation(values: deque[float]) -> float:
    """Estimate the standard deviation by the median absolute deviation, which is robust to outliers."""
    middle = median(values)
    return _MAD_TO_DEVIATION * median([abs(value - middle) for value in values])
