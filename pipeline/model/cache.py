"""Key-value cache for decoding."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """The last computed keys and values of B sequences, for every layer.

    Attributes:
        places: S, cache places per sequence.
        layers: keys and values [B, kv_heads, S, head_size] by layer; zeros at places not yet computed.
    """

    def __init__(self, places: int) -> None:
        """Create an empty cache; the first `put` allocates the tensors."""
        self.places = places
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def put(
        self, layer: int, where: Tensor, first: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values; return those of the first places, [B, kv_heads, first, head_size] each.

        Args:
            layer: index of the layer.
            where: [B, W] int64, the places to write.
            first: number of places to return.
            keys: [B, kv_heads, W, head_size], already rotated by their positions.
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
        """Keep only the sequences where `rows` [B] bool is True."""
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}
