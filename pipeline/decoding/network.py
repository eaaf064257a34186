"""The interface between the decoding loop and a network: forward passes, scores, tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pipeline.decoding.drawing import Head, draw_tokens
from pipeline.decoding.sampling import SamplingSettings
from pipeline.decoding.sequences import Sequences
from pipeline.model.batch import HeadOutput, Visibility
from pipeline.model.cache import KeyValueCache


class Network(Protocol):
    """A network that predicts masked positions, with one forward per step.

    Attributes:
        mask_id: the mask token.
        drops_rows: whether finished sequences may leave the batch.
    """

    mask_id: int
    drops_rows: bool

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences where `rows` [B] bool is True."""

    def is_done(self, alive: Tensor) -> bool:
        """Return whether decoding is finished; `alive` [B] bool marks sequences that need a forward."""

    def forward(self, now: Sequences, rows: Tensor) -> None:
        """Run one forward that predicts `rows` [R] of the flattened [B, L]."""

    def output(self, needs: tuple[str, ...]) -> HeadOutput:
        """Return the scores [R] of the last forward; ignore its losses."""

    def draw(self, chosen: Tensor, settings: SamplingSettings, counters: tuple[Tensor, ...]) -> Tensor:
        """Draw a token for each chosen row of the last forward, [F] int64.

        Args:
            chosen: [R] bool, the rows to fill.
            settings: temperature, top_k, top_p and seed.
            counters: [F] int64 each, the counters of the noise.
        """


class Body(Protocol):
    """What maps tokens to hidden states; see `pipeline.model.transformer.Body` for the arguments."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, visibility: Visibility) -> Tensor:
        """Return hidden states [B, L, H]."""

    def extend(self, input_ids: Tensor, where: Tensor, seen: Tensor, cache: KeyValueCache) -> Tensor:
        """Return hidden states [B, W, H] of some positions; the cache has the others."""


class Model(Protocol):
    """What decoding uses of a model, such as `MaskedDiffusionModel`."""

    @property
    def model(self) -> Body:
        """Its body."""

    @property
    def lm_head(self) -> Head:
        """Its output layer."""

    def outputs_of(self, rows: Tensor, length: int, visibility: Visibility) -> Tensor:
        """Return the indices into the flattened hidden states that predict `rows` [R] of [B, L]."""


class ModelNetwork:
    """A `Network` of a whole model in this process; it computes every position at every step."""

    drops_rows = True

    def __init__(self, model: Model, visibility: Visibility) -> None:
        """Prepare for sequences with `visibility`."""
        self.model = model
        self.head = model.lm_head
        self.mask_id = model.lm_head.vocabulary.mask_id
        self.in_blocks = visibility.blocks is not None

    def keep(self, rows: Tensor) -> None:
        """See `Network`: nothing is remembered between two forwards."""

    def is_done(self, alive: Tensor) -> bool:
        return not alive.any()

    def forward(self, now: Sequences, rows: Tensor) -> None:
        self.hidden = self.predict(now, rows)  # [R, H]

    def output(self, needs: tuple[str, ...]) -> HeadOutput:
        return self.head.scores(self.hidden, needs)

    def draw(self, chosen: Tensor, settings: SamplingSettings, counters: tuple[Tensor, ...]) -> Tensor:
        return draw_tokens(self.head, self.hidden[chosen], settings, counters)

    def predict(self, now: Sequences, rows: Tensor) -> Tensor:
        """Return the hidden states [R, H] that predict `rows` [R] of the flattened [B, L]."""
        inputs = now.inputs(self.mask_id)
        present = None if now.present.all() else now.present
        visibility = Visibility(now.blocks) if self.in_blocks else Visibility()
        hidden: Tensor = self.model.model(inputs, present, visibility).flatten(0, 1)
        return hidden[self.model.outputs_of(rows, inputs.shape[1], visibility)]


class CachedNetwork(ModelNetwork):
    """A network that computes the current block, and each finished block once more.

    This is exact for block-causal attention: after a block is filled, nothing that it sees changes, so its
    keys, values and hidden states are final. They are computed in the first step of the next block.
    """

    def __init__(self, model: Model, visibility: Visibility, now: Sequences) -> None:
        """Prepare for the sequences `now`, with an empty cache."""
        super().__init__(model, visibility)
        self.length = now.masked.shape[1]
        self.cache = KeyValueCache(self.length + 1)  # the last place holds the padding of shorter rows
        self.final = torch.zeros_like(now.masked)
        self.outputs: Tensor | None = None

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.final = self.final[rows]
        if self.outputs is not None:
            self.outputs = self.outputs[rows]

    def predict(self, now: Sequences, rows: Tensor) -> Tensor:
        """Return the hidden states [R, H] that predict `rows` [R] of the flattened [B, L]."""
        row, position = rows // self.length, rows % self.length
        current = now.blocks.new_zeros(len(now.rows), 1)
        current[row, 0] = now.blocks[row, position]  # [B, 1]; a row's candidates share one block
        needed = now.present & (now.blocks <= current) & ~self.final
        width = int(needed.sum(dim=1).max())
        first = torch.argsort(~needed, dim=1, stable=True)[:, :width]  # [B, W]
        where = torch.where(needed.gather(1, first), first, self.length)
        last = int(now.blocks.max()) + 1
        inputs = torch.nn.functional.pad(now.inputs(self.mask_id), (0, 1), value=self.mask_id)
        keys = torch.nn.functional.pad(now.blocks.masked_fill(~now.present, last), (0, 1), value=last)
        queries = keys.gather(1, where).clamp(max=last - 1)  # padding must see a key, or softmax gives NaN
        end = int((needed | self.final).any(dim=0).nonzero().max()) + 1
        seen = keys[:, None, None, :end] <= queries[:, None, :, None]  # [B, 1, W, S']
        hidden = self.model.model.extend(inputs.gather(1, where), where, seen, self.cache)
        self.final |= needed & (now.blocks < current)
        if self.outputs is None:
            self.outputs = hidden.new_zeros(len(hidden), self.length + 1, hidden.shape[2])
        self.outputs.scatter_(1, where[:, :, None].expand_as(hidden), hidden)
        known = self.outputs[:, :-1].flatten(0, 1)
        return known[self.model.outputs_of(rows, self.length, Visibility())]
