"""Keys and values that attention has computed before, so that a sampler need not compute them again."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer at the places of B sequences, as they were last computed.

    Attributes:
        places: S, how many places a sequence has.
        layers: of each layer, keys and values [B, kv_heads, S, head_size]; zeros where nothing was computed.
    """

    def __init__(self, places: int) -> None:
        """Make room for `places` places; the tensors are made when the first keys come."""
        self.places = places
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def put(
        self, layer: int, where: Tensor, first: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store what was computed; return what the first places hold, [B, kv_heads, first, head_size] twice.

        Args:
            layer: number of the layer.
            where: [B, W] int64, the places that were computed.
            first: how many places are attended to.
            keys: [B, kv_heads, W, head_size], turned by their positions.
            values: [B, kv_heads, W, head_size].
        """
        if layer not in self.layers:
            rows, heads, _, size = keys.shape
            empty = keys.new_zeros(rows, heads, self.places, size)
            self.layers[layer] = empty, torch.zeros_like(empty)
        index = where[:, None, :, None].expand_as(keys)
        for stored, new in zip(self.layers[layer], (keys, values), strict=True):
            stored.scatter_(2, index, new)
        keys, values = self.layers[layer]
        return keys[:, :, :first], values[:, :, :first]

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but `rows` [B] bool."""
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}
