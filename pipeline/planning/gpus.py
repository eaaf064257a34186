"""What GPUs can do at best, by the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        flops: bf16 products with fp32 sums, FLOP/s, dense; data sheets often show the double, with sparsity.
        memory: bytes that torch can see (`torch.cuda.get_device_properties`), a little less than the sheet's.
        memory_bandwidth: bytes/s.
        link: bytes/s in each direction to the other GPUs of a node.
        network: bytes/s in each direction for each GPU between nodes, in the vendor's reference system; where
            there is none, a 100 Gbit/s card for two GPUs.
        node_size: GPUs of that system's node.
        device_names: what the names that torch gives this GPU begin with; the first GPU that fits is it.
    """

    flops: float
    memory: int
    memory_bandwidth: float
    link: float
    network: float
    node_size: int
    device_names: tuple[str, ...]


# By NVIDIA's data sheets of the H100, H200, GH200, A100, L40S and DGX B200 (divided by 8), and AMD's
# of the MI300X and MI325X. NVLink, PCIe and Infinity Fabric are sold by the sum of both directions: here is
# one. network: DGX A100 8 x 200 Gbit/s, DGX H100, H200 and B200 and AMD's platforms 8 x 400.
GPUS: dict[str, Gpu] = {
    "h100-pcie": Gpu(756e12, 79 * GIB, 2.0e12, 64e9, 6.25e9, 8, ("NVIDIA H100 PCIe",)),
    "h100": Gpu(989e12, 79 * GIB, 3.35e12, 450e9, 50e9, 8, ("NVIDIA H100 80GB", "NVIDIA H100 SXM")),
    "h200": Gpu(989e12, 139 * GIB, 4.8e12, 450e9, 50e9, 8, ("NVIDIA H200",)),
    "gh200": Gpu(989e12, 94 * GIB, 4.0e12, 450e9, 50e9, 1, ("NVIDIA GH200",)),
    "b200": Gpu(2250e12, 178 * GIB, 8.0e12, 900e9, 50e9, 8, ("NVIDIA B200",)),
    "a100-80": Gpu(
        312e12, 79 * GIB, 2.039e12, 300e9, 25e9, 8, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB")
    ),
    "a100-40": Gpu(
        312e12, 39 * GIB, 1.555e12, 300e9, 25e9, 8, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM-40GB")
    ),
    "a100-pcie": Gpu(312e12, 79 * GIB, 1.935e12, 32e9, 6.25e9, 8, ("NVIDIA A100 80GB PCIe",)),
    "l40s": Gpu(362e12, 44 * GIB, 0.864e12, 32e9, 6.25e9, 8, ("NVIDIA L40S",)),
    "mi300x": Gpu(1307e12, 191 * GIB, 5.3e12, 448e9, 50e9, 8, ("AMD Instinct MI300X",)),
    "mi325x": Gpu(1307e12, 255 * GIB, 6.0e12, 448e9, 50e9, 8, ("AMD Instinct MI325X",)),
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name in GPUS; raise a `UserError` with the nearest one for any other."""
    if name not in GPUS:
        raise UserError(f"--gpu {name} is not known.{nearest(name, GPUS)} Known: {', '.join(GPUS)}.")
    return GPUS[name]


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the GPU of a name as `torch.cuda.get_device_name` gives it; None for one that is not listed."""
    fitting = (gpu for gpu in GPUS.values() if device_name.startswith(gpu.device_names))
    return next(fitting, None)
