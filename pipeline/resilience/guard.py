"""The guard: an update that would harm the weights is not made, on no rank.

Before an update all ranks exchange one small tensor, the worst loss of any micro-batch and whether a rank was
asked to stop; the gradient norm is global already. So all ranks judge by the same numbers and need no further
word. They are read on the host, where DeepSpeed waits for the norm in any case.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import GuardConfig
from pipeline.ranks import Ranks
from pipeline.resilience.stop import Stop

WINDOW = 128  # steps that a new one is compared with
FEWEST = 32  # with fewer, only what is not finite is refused
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_DEVIATION = 0.1  # of a gradient norm, as a share of the median
_LEAST_JUMP = 1.0  # of a loss, in nats: near 0 any change is many deviations


@dataclass
class Window:
    """What the next steps are compared with.

    Attributes:
        losses: the worst loss (nats) of each of the last steps.
        norms: their gradient norms.
        in_a_row: steps that were refused one after the other, up to the last one.
    """

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    in_a_row: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what a resumed run needs to judge alike, as JSON has it."""
        return {"losses": list(self.losses), "norms": list(self.norms), "in_a_row": self.in_a_row}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Become the window that `to_json` described; without values, one that has seen nothing."""
        self.losses, self.norms = (deque(values.get(name, []), WINDOW) for name in ("losses", "norms"))
        self.in_a_row = values.get("in_a_row", 0)  # older checkpoints have none


class Guard:
    """Judges each step before its update.

    Attributes:
        window: what the next step is compared with.
        problem: why the last step was refused; None when it was not.
    """

    def __init__(
        self,
        config: GuardConfig,
        gradient_clip: float,
        window: Window | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Make the guard.

        Args:
            config: the limits.
            gradient_clip: ``optimizer.gradient_clip``: a norm that clipping would leave alone is no spike.
            window: what the first step is compared with; by default nothing.
            stop: what the ranks agree on in the same exchange, where the run can be stopped.
        """
        self.config = config
        self.gradient_clip = gradient_clip
        self.window = window or Window()
        self.stop = stop
        self.problem: str | None = None

    def forget(self) -> None:
        """Begin without a history: the steps to come are not of the same kind as those before."""
        self.window.losses.clear()
        self.window.norms.clear()

    def watch(self, ranks: Ranks, losses: Tensor) -> Callable[[Tensor], bool]:
        """Begin to judge a step; every rank calls this after its last backward.

        Args:
            ranks: what exchanges the numbers.
            losses: this rank's loss of each micro-batch [G].

        Returns:
            What the engine asks with the global gradient norm [] whether to update the weights.
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
        """Say whether a step with this worst loss (nats) and gradient norm is sound, and remember it."""
        norm = norm if norm >= 0 else math.inf  # -1 is DeepSpeed's sign for a norm that is not finite
        self.problem = self._problem(loss, norm)
        for history, value in ((self.window.losses, loss), (self.window.norms, norm)):
            if math.isfinite(value):  # spikes too: what is not a spike any more must become the rule
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
            # With a sound loss, batch after batch, it is not the examples: the weights have come to where the
            # gradients are larger. Skipping does not lead out of there; clipped steps do.
            self.window.norms.clear()
            return None
        return f"the gradient norm is {norm:.4g}, above {highest:.4g}"

    def _highest(self, history: deque[float], least_jump: float = 0.0, least_deviation: float = 0.0) -> float:
        """Return the limit; `least_deviation` is a share of the median."""
        if len(history) < FEWEST:
            return math.inf
        middle = _median(history)
        deviation = max(_deviation(history), least_deviation * middle)
        return middle + max(self.config.spike_limit * deviation, least_jump)


def _median(values: Sequence[float] | deque[float]) -> float:
    return float(np.median(values))


def _deviation(values: deque[float]) -> float:
    """Return the standard deviation as the median absolute deviation estimates it: outliers do not count."""
    middle = _median(values)
    return _MAD_TO_DEVIATION * _median([abs(value - middle) for value in values])
