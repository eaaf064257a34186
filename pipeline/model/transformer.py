"""The network: a transformer, bidirectional by default, with the parameter names of Qwen and Llama."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from pipeline.config import ModelConfig, Recompute
from pipeline.model.attention import Attention, Remember, rotary_table
from pipeline.model.batch import EVERYTHING, HeadOutput, MaskedBatch, Visibility, Vocabulary
from pipeline.model.cache import KeyValueCache
from pipeline.model.layers import Embedding, SwiGLU, recomputed
from pipeline.model.masked_head import MaskedHead
from pipeline.model.sequence import WHOLE, WholeSequence
from pipeline.model.visibility import attention_mask as mask_of


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: ModelConfig, sequence: WholeSequence, recompute: Recompute) -> None:
        """Create the block; output projections are initialised smaller by 1/sqrt(2 x layers)."""
        super().__init__()
        residual_std = config.init_std / (2 * config.layers) ** 0.5
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, residual_std, sequence)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(
            config.hidden_size, config.intermediate_size, config.init_std, residual_std, recompute
        )

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        attention_mask: Tensor | BlockMask | None,
        remember: Remember | None = None,
    ) -> Tensor:
        """Return [B, L / N, H] for x [B, L / N, H], this process's positions."""
        x = x + self.self_attn(self.input_layernorm(x), table, attention_mask, remember)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, blocks and final norm; their parameters have the prefix ``model.``, as in Qwen and Llama."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, sequence: WholeSequence, recompute: Recompute
    ) -> None:
        """Create the layers for `vocab_size` tokens."""
        super().__init__()
        self.sequence = sequence
        self.recompute = recompute == "blocks"
        self.config = config
        self.embed_tokens = Embedding(vocab_size, config.hidden_size, config.init_std)
        self.layers = nn.ModuleList(Block(config, sequence, recompute) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, visibility: Visibility = EVERYTHING
    ) -> Tensor:
        """Return hidden states [B, L, H]; with `clean_ids` [B, 2 L, H], those of xt first.

        Args:
            input_ids: [B, L], xt.
            attention_mask: [B, L] bool, False at padding.
            visibility: which positions each position sees.
        """
        keys = mask_of(attention_mask, visibility, self.config.head_width)
        table_length, copies = input_ids.shape[1], 1
        if visibility.clean_ids is not None:
            input_ids, copies = torch.cat([input_ids, visibility.clean_ids], dim=1), 2
        length = input_ids.shape[1]
        x = self.embed_tokens(self.sequence.own(input_ids, dim=1))  # [B, L / N, H]
        angles = self.angles(table_length, x.device)
        cos, sin = (part.repeat(copies, 1) for part in angles)  # x0 has the positions of xt
        table = self.sequence.own(cos, dim=0), self.sequence.own(sin, dim=0)
        for layer in self.layers:
            x = recomputed(layer, x, table, keys) if self.recompute else layer(x, table, keys)
        return self.sequence.gather(self.norm(x), dim=1, length=length)

    def angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [L, head_size] of the positions 0..L-1."""
        config = self.config
        rope = config.rope_theta, config.rope_factor, config.rope_original_length
        return rotary_table(length, config.head_width, *rope, device)

    def extend(self, input_ids: Tensor, where: Tensor, seen: Tensor, cache: KeyValueCache) -> Tensor:
        """Return hidden states [B, W, H] of some positions, which attend to the others through the cache.

        Args:
            input_ids: [B, W], tokens.
            where: [B, W] int64, positions, which are also the places in the cache.
            seen: [B, 1, W, S'] bool, False where a place is hidden; places from S' on are hidden from all.
            cache: keys and values of S places; those of `where` are updated.
        """
        x = self.embed_tokens(input_ids)
        cos, sin = self.angles(cache.places, x.device)
        table = cos[where][:, None], sin[where][:, None]  # [B, 1, W, head_size]
        for number, layer in enumerate(self.layers):
            x = layer(x, table, seen, partial(cache.put, number, where, seen.shape[3]))
        return self.norm(x)


class MaskedDiffusionModel(nn.Module):
    """p(x0 | xt) at the masked positions of xt; the network has no time input and no objective."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        recompute: Recompute = "none",
        sequence: WholeSequence = WHOLE,
    ) -> None:
        """Create the model.

        Args:
            config: shape of the network.
            vocabulary: the vocabulary.
            recompute: activations to recompute in the backward pass (`EngineConfig`).
            sequence: which positions and masked rows this process computes.
        """
        super().__init__()
        self.sequence = sequence
        self.shifted = config.prediction == "shifted"
        self.model = Body(config, vocabulary.rows, sequence, recompute)
        output = self.model.embed_tokens
        if not config.tie_embeddings:
            output = Embedding(vocabulary.rows, config.hidden_size, config.init_std)
        self.lm_head = MaskedHead(output.weight, vocabulary)

    def forward(self, batch: MaskedBatch) -> HeadOutput:
        """Return loss, NLL and scores at the rows of `batch`."""
        hidden = self.model(batch.input_ids, batch.attention_mask, batch.visibility)
        outputs = self.outputs_of(batch.rows, batch.input_ids.shape[1], batch.visibility)
        rows, places, targets, weights = (
            self.sequence.own(x, dim=0) for x in (outputs, batch.rows, batch.targets, batch.weights)
        )
        draw, draw_places = None, batch.draw
        if draw_places is not None:
            draw = lambda logits, part: draw_places(logits, places[part])  # noqa: E731
        output: HeadOutput = self.lm_head(hidden.flatten(0, 1)[rows], targets, weights, batch.scores, draw)
        return output if self.sequence.size == 1 else self._join(output, batch)

    def _join(self, own: HeadOutput, batch: MaskedBatch) -> HeadOutput:
        """Return the output for all rows of `batch`; the loss has the gradient of this process's rows."""
        values = {
            name: self.sequence.gather(x, dim=0, length=len(batch.rows))
            for name, x in own._asdict().items()
            if name != "loss" and x is not None
        }
        total = (values["nll"] * batch.weights).sum()
        return HeadOutput(own.loss + (total - own.loss).detach(), **values)

    def outputs_of(self, rows: Tensor, length: int, visibility: Visibility) -> Tensor:
        """Return the indices into the flattened outputs [B, L or 2 L] that predict `rows` [R] of [B, L].

        With shifted prediction, the output at i - 1 predicts position i. For the first position of a block
        this is the output of the clean copy, as in decoding. Position 0 is never predicted.
        """
        copies = 1 if visibility.clean_ids is None else 2
        row, position = rows // length, rows % length
        if self.shifted:
            before = (position - 1).clamp(min=0)
            if copies == 2 and visibility.blocks is not None:
                crosses = visibility.blocks[row, before] != visibility.blocks[row, position]
                before = before + length * crosses
            position = before
        return row * (copies * length) + position

    @torch.no_grad()
    def logits(
        self,
        input_ids: Tensor,
        rows: Tensor,
        attention_mask: Tensor | None = None,
        visibility: Visibility = EVERYTHING,
    ) -> Tensor:
        """Return logits [R, V] float32 for `rows` [R] of the flattened input_ids [B, L], for decoding."""
        hidden = self.model(input_ids, attention_mask, visibility).flatten(0, 1)
        return self.lm_head.logits(hidden[self.outputs_of(rows, input_ids.shape[1], visibility)])
