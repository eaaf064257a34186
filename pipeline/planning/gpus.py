"""Peak performance of GPUs, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        flops: dense bf16 FLOP/s with fp32 accumulation; data sheets often quote twice that, with sparsity.
        memory: bytes visible to torch (`torch.cuda.get_device_properties`), slightly less than on the sheet.
        memory_bandwidth: bytes/s.
        link: bytes/s per direction to the other GPUs of the node.
        network: bytes/s per direction and GPU between nodes, in the vendor's reference system; without one,
            a 100 Gbit/s card per two GPUs.
        node_size: GPUs per node of that system.
        device_names: prefixes of torch's device name; the first matching GPU in GPUS wins.
    """

    flops: float
    memory: int
    memory_bandwidth: float
    link: float
    network: float
    node_size: int
    device_names: tuple[str, ...]


# From NVIDIA's data sheets of the H100, H200, GH200, A100, L40S and DGX B200 (divided by 8), and AMD's of the
# MI300X and MI325X. NVLink, PCIe and Infinity Fabric are quoted for both directions together; this is one
# direction. network: DGX A100 8 x 200 Gbit/s; DGX H100, H200 and B200 and AMD's platforms 8 x 400 Gbit/s.
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
    """Return the GPU named `name`; raise a `UserError` that suggests the nearest name if it is unknown."""
    if name not in GPUS:
        raise UserError(f"--gpu {name} is not known.{nearest(name, GPUS)} Known: {', '.join(GPUS)}.")
    return GPUS[name]


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the GPU for a name from `torch.cuda.get_device_name`; None if it is not listed."""
    fitting = (gpu for gpu in GPUS.values() if device_name.startswith(gpu.device_names))
    return next(fitting, None)
