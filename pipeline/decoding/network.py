"""The forwards of the sampler: of whole sequences, or of what a cache does not hold yet."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.decoding.sequences import Sequences
from pipeline.model.batch import Visibility
from pipeline.model.cache import KeyValueCache
from pipeline.model.transformer import MaskedDiffusionModel


class WholeForward:
    """Computes every position at every step."""

    def __init__(self, model: MaskedDiffusionModel, visibility: Visibility) -> None:
        """Make it for sequences that see each other as in `visibility`."""
        self.model = model
        self.in_blocks = visibility.blocks is not None

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but `rows` [B] bool."""

    def hidden(self, now: Sequences, rows: Tensor) -> Tensor:
        """Return the hidden states [R, H] that predict `rows` [R] of the flattened [B, L]."""
        inputs = now.inputs(self.model.lm_head.vocabulary.mask_id)
        present = None if now.present.all() else now.present
        visibility = Visibility(now.blocks) if self.in_blocks else Visibility()
        hidden: Tensor = self.model.model(inputs, present, visibility).flatten(0, 1)
        return hidden[self.model.outputs_of(rows, inputs.shape[1], visibility)]


class CachedForward:
    """Computes the current block, and each block before it once more when it is whole.

    Exact where a position sees its own block and the ones before it: once a block is filled and computed,
    nothing that it sees ever changes, and so neither do its keys, values and hidden states. The forward that
    first shows a block as a whole is that of the following block's first step.
    """

    def __init__(self, model: MaskedDiffusionModel, now: Sequences) -> None:
        """Make it for the sequences `now`, of which nothing is known yet."""
        self.model = model
        self.length = now.masked.shape[1]
        self.cache = KeyValueCache(self.length + 1)  # the last place takes what fills up a shorter row
        self.final = torch.zeros_like(now.masked)
        self.outputs: Tensor | None = None

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but `rows` [B] bool."""
        self.cache.keep(rows)
        self.final = self.final[rows]
        if self.outputs is not None:
            self.outputs = self.outputs[rows]

    def hidden(self, now: Sequences, rows: Tensor) -> Tensor:
        """Return the hidden states [R, H] that predict `rows` [R] of the flattened [B, L]."""
        row, position = rows // self.length, rows % self.length
        current = now.blocks.new_zeros(len(now.rows), 1)
        current[row, 0] = now.blocks[row, position]  # [B, 1]; all of a row are in the same block
        needed = now.present & (now.blocks <= current) & ~self.final
        width = int(needed.sum(dim=1).max())
        first = torch.argsort(~needed, dim=1, stable=True)[:, :width]  # [B, W]
        where = torch.where(needed.gather(1, first), first, self.length)
        last = int(now.blocks.max()) + 1
        mask_id = self.model.lm_head.vocabulary.mask_id
        inputs = torch.nn.functional.pad(now.inputs(mask_id), (0, 1), value=mask_id)
        keys = torch.nn.functional.pad(now.blocks.masked_fill(~now.present, last), (0, 1), value=last)
        queries = keys.gather(1, where).clamp(max=last - 1)  # what fills up sees something, too
        end = int((needed | self.final).any(dim=0).nonzero().max()) + 1
        seen = keys[:, None, None, :end] <= queries[:, None, :, None]  # [B, 1, W, S']
        hidden = self.model.model.extend(inputs.gather(1, where), where, seen, self.cache)
        self.final |= needed & (now.blocks < current)
        if self.outputs is None:
            self.outputs = hidden.new_zeros(len(hidden), self.length + 1, hidden.shape[2])
        self.outputs.scatter_(1, where[:, :, None].expand_as(hidden), hidden)
        known = self.outputs[:, :-1].flatten(0, 1)
        return known[self.model.outputs_of(rows, self.length, Visibility())]


Forward = WholeForward | CachedForward
