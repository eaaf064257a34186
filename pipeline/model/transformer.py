"""The network: a bidirectional transformer whose parameters are named as Hugging Face's Qwen and Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig
from pipeline.model.attention import Attention, rotary_frequencies, rotary_table
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.model.layers import Embedding, SwiGLU
from pipeline.model.masked_head import MaskedHead
from pipeline.model.sequence import WHOLE, WholeSequence


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: ModelConfig, sequence: WholeSequence) -> None:
        """Make the block; what writes to the residual stream starts smaller, by 1/sqrt(2 x layers)."""
        super().__init__()
        residual_std = config.init_std / (2 * config.layers) ** 0.5
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, residual_std, sequence)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.init_std, residual_std)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], attention_mask: Tensor | None) -> Tensor:
        """Return [B, L / N, H] for x [B, L / N, H], this process's positions."""
        x = x + self.self_attn(self.input_layernorm(x), table, attention_mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Tokens to hidden states; the name of its attribute gives the parameters their ``model.`` prefix."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, recompute_blocks: bool, sequence: WholeSequence
    ) -> None:
        """Make the layers for `vocab_size` tokens."""
        super().__init__()
        self.sequence = sequence
        self.recompute_blocks = recompute_blocks
        self.config = config
        self.embed_tokens = Embedding(vocab_size, config.hidden_size, config.init_std)
        self.layers = nn.ModuleList(Block(config, sequence) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return hidden states [B, L, H] for input_ids [B, L]; attention_mask [B, L] is False at padding."""
        length = input_ids.shape[1]
        x = self.embed_tokens(self.sequence.own(input_ids, dim=1))  # [B, L / N, H]
        cos, sin = rotary_table(length, rotary_frequencies(self.config, x.device))
        table = self.sequence.own(cos, dim=0), self.sequence.own(sin, dim=0)
        keys = None if attention_mask is None else attention_mask[:, None, None, :]
        for layer in self.layers:
            if self.recompute_blocks and torch.is_grad_enabled():  # there is no dropout: no generator state
                x = checkpoint(layer, x, table, keys, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, table, keys)
        return self.sequence.gather(self.norm(x), dim=1, length=length)


class MaskedDiffusionModel(nn.Module):
    """p(x0 | xt) at the masked positions of xt; the network has no time input and no objective."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        recompute_blocks: bool = False,
        sequence: WholeSequence = WHOLE,
    ) -> None:
        """Make the model.

        Args:
            config: shape of the network.
            vocabulary: the tokens.
            recompute_blocks: keep only the input of each block for the backward, and run the block again
                there (Chen et al. 2016, arXiv 1604.06174).
            sequence: which positions and masked rows this process computes.
        """
        super().__init__()
        self.sequence = sequence
        self.model = Body(config, vocabulary.rows, recompute_blocks, sequence)
        output = self.model.embed_tokens
        if not config.tie_embeddings:
            output = Embedding(vocabulary.rows, config.hidden_size, config.init_std)
        self.lm_head = MaskedHead(output.weight, vocabulary)

    def forward(self, batch: MaskedBatch) -> HeadOutput:
        """Return loss, NLL and scores at the rows of `batch`."""
        hidden = self.model(batch.input_ids, batch.attention_mask)
        rows, targets, weights = (
            self.sequence.own(x, dim=0) for x in (batch.rows, batch.targets, batch.weights)
        )
        output: HeadOutput = self.lm_head(hidden.flatten(0, 1)[rows], targets, weights, batch.scores)
        return output if self.sequence.size == 1 else self._join(output, batch)

    def _join(self, own: HeadOutput, batch: MaskedBatch) -> HeadOutput:
        """Return the output for all rows of `batch`; the gradient of its loss is that of this process's."""
        values = {
            name: self.sequence.gather(x, dim=0, length=len(batch.rows))
            for name, x in own._asdict().items()
            if name != "loss" and x is not None
        }
        total = (values["nll"] * batch.weights).sum()
        return HeadOutput(own.loss + (total - own.loss).detach(), **values)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, rows: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits [R, V] float32 at `rows` [R] of the flattened input_ids [B, L], for sampling."""
        hidden = self.model(input_ids, attention_mask)
        return self.lm_head.logits(hidden.flatten(0, 1)[rows])
