"""Visible pairs of packed documents that are kept apart, from the lengths in the datasets' indices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.arrays import Array
from pipeline.data.indexed import read_index
from pipeline.data.paths import idx_path

# Of a long index only so many consecutive lengths are read, at so many places.
PIECE, PIECES = 2**14, 64


def document_pairs(data: DataConfig) -> float | None:
    """Return the expected (query, key) pairs of an example that lie in one document, by ``data.weights``.

    None if documents are not kept apart, or a dataset does not exist yet: all L^2 pairs are in one then.
    """
    if not data.isolate_documents or not all(idx_path(Path(prefix)).is_file() for prefix in data.prefixes):
        return None
    length, tokens, pairs = data.sequence_length, [], []
    for prefix in data.prefixes:
        index = read_index(Path(prefix))
        lengths = np.concatenate(list(_read(index.lengths))).astype(np.float64)
        tokens.append(index.tokens)
        pairs.append(length * pairs_within(lengths, length).sum() / max(1.0, lengths.sum()))
    shares = data.weights or tokens
    if data.temperature is not None:
        shares = [count ** (1 / data.temperature) for count in tokens]
    return float(np.average(pairs, weights=shares))


def pairs_within(lengths: Array, limit: int) -> Array:
    """Return the expected pairs of positions that share document and example, [documents] float64.

    A document of n tokens begins anywhere in an example of `limit` tokens. Two positions at distance t then
    share an example with probability max(0, 1 - t / limit), so the sum is n + 2 sum_t (n - t)(1 - t / limit).

    Args:
        lengths: [documents] float64, tokens of each.
        limit: tokens of an example.
    """
    last = np.minimum(lengths, limit) - 1  # the largest distance, t
    once = last * (last + 1) / 2  # sum of t
    squares = once * (2 * last + 1) / 3  # sum of t^2
    pairs: Array = lengths + 2 * (lengths * last - (1 + lengths / limit) * once + squares / limit)
    return np.where(lengths > 0, pairs, 0.0)


def _read(lengths: Array) -> Iterator[Array]:
    """Yield the lengths, or evenly spaced pieces of them."""
    step = max(PIECE, len(lengths) // PIECES)
    return (lengths[first : first + PIECE] for first in range(0, len(lengths), step))
