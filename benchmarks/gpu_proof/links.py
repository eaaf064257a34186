"""Bytes a second that the collectives of ZeRO reach among the GPUs of this machine.

usage: torchrun --nproc_per_node N -m benchmarks.gpu_proof.links --output FILE.json
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed

from benchmarks.gpu_proof.measuring import output_of, seconds_each, write
from pipeline.base.cli import run
from pipeline.ranks import join_ranks

SIZES = (2**20, 2**24, 2**28)  # bytes of the full tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on every rank; the first one writes.

    A ring moves (N - 1) / N of the full tensor through each link: that is what the rates count.
    """
    path, ranks = output_of(__doc__, arguments), join_ranks()
    ranks.connect()
    on_gpu, count = ranks.device.type == "cuda", ranks.world_size
    rates: dict[str, dict[str, float]] = {"all_gather": {}, "reduce_scatter": {}}
    for size in SIZES if on_gpu else SIZES[:1]:
        elements = size // 2 // count * count
        whole = torch.zeros(elements, dtype=torch.bfloat16, device=ranks.device)
        part = torch.zeros(elements // count, dtype=torch.bfloat16, device=ranks.device)
        moved = elements * 2 * (count - 1) / count
        gather = seconds_each(
            lambda w=whole, p=part: torch.distributed.all_gather_into_tensor(w, p), ranks.device, 5
        )
        scatter = seconds_each(
            lambda w=whole, p=part: torch.distributed.reduce_scatter_tensor(p, w), ranks.device, 5
        )
        rates["all_gather"][str(size)] = moved / gather
        rates["reduce_scatter"][str(size)] = moved / scatter
    largest = str(max(map(int, rates["all_gather"])))
    figures = {
        "ranks": count,
        "link_bytes_per_second": min(rate[largest] for rate in rates.values()),
        "rates": rates,
    }
    if ranks.is_first:
        write(path, figures)
    ranks.disconnect()


if __name__ == "__main__":
    run(main, of_ranks=True)
