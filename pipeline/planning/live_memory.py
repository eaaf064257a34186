"""Track the memory of live tensors, real or fake."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Track the storages that operations return until they are released.

    Temporary memory inside an operation is not tracked.

    Attributes:
        now: live bytes.
        peak: maximum of `now`; assign `now` to reset it.
    """

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        """Start at zero; the storages of `present` are not counted."""
        # A mode imports it at the first operation; inside zero.Init, which patches Tensor.new, that fails.
        importlib.import_module("torch._dynamo")
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in present}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count its results."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.seen:
            self.seen.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self.seen.remove(key)
        self.now -= size
