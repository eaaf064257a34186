"""Find the rank that slows the others down.

Under ZeRO-3 the ranks wait for each other in every layer, so the step time is the same on all and identifies
no straggler. Instead, each rank measures what does not depend on the others: the time it waits for examples,
and the time its device takes for a fixed matrix product. The product runs right after training steps, when
the device is as warm as during them.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

from pipeline.chains.stream import SlotStream
from pipeline.ranks import Ranks

MEASURES = ("data_wait", "compute_probe")  # seconds a step, seconds a probe
_PRODUCTS = 4


class Stragglers:
    """Measures this rank and compares all ranks."""

    def __init__(self, ranks: Ranks, stream: SlotStream) -> None:
        """Prepare the probe."""
        self.ranks = ranks
        self.stream = stream
        on_gpu = self.ranks.device.type == "cuda"
        size, dtype = (4096, torch.bfloat16) if on_gpu else (256, torch.float32)
        self.matrix = torch.full((size, size), 1.0 / size, dtype=dtype, device=self.ranks.device)
        self._probe()  # warm-up: the first product loads the library

    def _probe(self) -> float:
        """Return the seconds that the device takes for the matrix products."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        product = self.matrix
        for _ in range(_PRODUCTS):
            product = product @ self.matrix
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def measure(self, steps: int) -> Tensor:
        """Return a [2 * ranks] float64 tensor to sum over the ranks; each rank fills in its own entries.

        Args:
            steps: steps since the last call.
        """
        mine = torch.zeros(len(MEASURES), self.ranks.world_size, dtype=torch.float64)
        mine[:, self.ranks.rank] = torch.tensor([self.stream.take_waited() / steps, self._probe()])
        return mine.flatten().to(self.ranks.device)

    def figures(self, measured: list[float]) -> dict[str, float]:
        """Return the slowest rank, its value and the median per measure, from the summed `measure`s."""
        figures: dict[str, float] = {}
        for row, name in enumerate(MEASURES):
            values = measured[row * self.ranks.world_size : (row + 1) * self.ranks.world_size]
            slowest = max(range(len(values)), key=values.__getitem__)
            figures |= {
                f"ranks/{name}_slowest": values[slowest],
                f"ranks/{name}_median": median(values),
                f"ranks/{name}_slowest_rank": slowest,
            }
        return figures
