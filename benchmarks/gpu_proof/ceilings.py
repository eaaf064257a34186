"""What the card can do at most: rates of products, of memory and of its link to the host; time of a launch.

usage: python -m benchmarks.gpu_proof.ceilings --output FILE.json
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.gpu_proof.measuring import output_of, seconds_each, there, write
from pipeline.base.cli import run

LAUNCHES = 1000
# Rows, inner and outer size of products: the largest rate, and those that the presets live on.
PRODUCTS = {
    "square of 8192": (8192, 8192, 8192),
    "125M, SwiGLU": (32 * 512, 512, 1536),
    "125M, logits": (4096, 512, 151_648),
    "350M, SwiGLU": (32 * 1024, 1024, 2816),
    "1B, SwiGLU": (8 * 2048, 2048, 5632),
}


def product_rates(device: torch.device) -> dict[str, float]:
    """Return the FLOP/s of bf16 products, by what they stand for; 64 times smaller on a CPU."""
    rates = {}
    for name, sizes in PRODUCTS.items():
        rows, inner, outer = sizes if device.type == "cuda" else (max(1, size // 64) for size in sizes)
        left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        right = torch.randn(inner, outer, device=device, dtype=torch.bfloat16)
        rates[name] = 2 * rows * inner * outer / seconds_each(lambda a=left, b=right: a @ b, device)
    return rates


def copy_rate(device: torch.device, of_host: bool = False) -> float:
    """Return bytes a second of copies: read and written in device memory, or moved from the host's."""
    size = 2**30 if device.type == "cuda" else 2**22
    if of_host:
        source = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.empty(size, dtype=torch.uint8, device=device)
        return size / seconds_each(lambda: target.copy_(source, non_blocking=True), device, 5)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    return 2 * size / seconds_each(lambda: target.copy_(source), device)


def launch_seconds(device: torch.device) -> float:
    """Return the seconds between two launches of a kernel that does next to nothing."""
    one = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return seconds_each(launches, device, 1) / LAUNCHES


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write everything."""
    path, device = output_of(__doc__, arguments), there()
    rates = product_rates(device)
    figures = {
        "flops_per_second": max(rates.values()),
        "memory_bytes_per_second": copy_rate(device),
        "host_bytes_per_second": copy_rate(device, of_host=True),
        "launch_seconds": launch_seconds(device),
        "products": rates,
    }
    write(path, figures)


if __name__ == "__main__":
    run(main)
