"""Copies of a rank's state in host memory, written to the disk while training continues."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class HostCopy:
    """Copies states to host memory, into the same buffers each time.

    A new copy overwrites the last one. The buffers take the size of the state for the whole run; fresh memory
    would make every copy several times slower. They are pinned, so a GPU copies at the full speed of its bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._shared: dict[Any, Tensor] = {}
        self._on_gpu = False

    def __call__(self, name: str, state: Any) -> Any:
        """Return a copy of `state` (nested dictionaries, lists and tuples of tensors and plain values).

        Args:
            name: name of the copy; copies of different names exist side by side.
            state: what to copy. Tensors that share memory share it in the copy, too.
        """
        self._shared.clear()
        copied = self._copy(name, state)
        if self._on_gpu:
            torch.cuda.synchronize()
        return copied

    def _copy(self, place: str, state: Any) -> Any:
        if isinstance(state, Tensor):
            return self._tensor(place, state.detach())
        if isinstance(state, Mapping):
            return {key: self._copy(f"{place}/{key}", value) for key, value in state.items()}
        if type(state) in (list, tuple):
            return type(state)(self._copy(f"{place}/{i}", value) for i, value in enumerate(state))
        return copy.deepcopy(state)

    def _tensor(self, place: str, tensor: Tensor) -> Tensor:
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in self._shared:
            return self._shared[memory]
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._buffers[place] = pinned(buffer) if tensor.is_cuda else buffer
        self._on_gpu |= tensor.is_cuda
        buffer.copy_(tensor, non_blocking=True)
        self._shared[memory] = buffer
        return buffer


def pinned(buffer: Tensor) -> Tensor:
    """Pin the memory of `buffer`, so that a GPU copies to it at full speed, and return it.

    torch's own pinned buffers are rounded up to a power of two: up to twice the memory.
    """
    cuda, address = torch.cuda.cudart(), buffer.data_ptr()
    if buffer.nbytes and int(cuda.cudaHostRegister(address, buffer.nbytes, 0)) == 0:
        weakref.finalize(buffer, cuda.cudaHostUnregister, address)
    return buffer


def state_bytes(state: Any) -> int:
    """Return the bytes of the tensors in a nested state."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
