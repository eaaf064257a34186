"""Counting what makes the host wait for the device, on a machine that has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operations whose result, or whose size, the host must have before it can go on.
READS = {
    aten._local_scalar_dense,  # item, bool(), int(), float(), slicing by a tensor
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten.repeat_interleave,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.item}


class _Operations(TorchDispatchMode):
    def __init__(self, reads: list[str], on_host: list[Tensor]) -> None:
        super().__init__()
        self.reads, self.on_host = reads, on_host

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        by_mask = packet in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (packet in READS or by_mask) and not _among(args[0], self.on_host):
            self.reads.append(str(function))
        return function(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, reads: list[str], on_host: list[Tensor]) -> None:
        super().__init__()
        self.reads, self.on_host = reads, on_host

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in TO_HOST and not _among(args[0], self.on_host):
            self.reads.append(function.__name__)
        return function(*args, **(kwargs or {}))


def _among(tensor: Any, others: list[Tensor]) -> bool:
    return any(tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in others)


@contextlib.contextmanager
def host_reads(on_host: Iterable[Tensor] = ()) -> Iterator[list[str]]:
    """Yield a list that fills with the names of the reads made inside, forward and backward.

    Args:
        on_host: tensors that are the host's own beside a GPU too, and may be read.
    """
    reads: list[str] = []
    tensors = list(on_host)
    with _Calls(reads, tensors), _Operations(reads, tensors):
        yield reads
