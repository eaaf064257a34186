"""A masked diffusion language model: a transformer that fills in masked tokens."""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .configuration_masked_diffusion import MaskedDiffusionConfig
from .decoding_masked_diffusion import KeyValueCache, Remember, rotary_table, rotate
from .generation_masked_diffusion import MaskedDiffusionGenerationMixin


class Fp32Product(torch.autograd.Function):
    """hidden [R, H] @ weight [V, H]^T in float32 from bf16 operands; torch has no derivative for that."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(hidden.dtype)
        return torch.mm(gradient, weight), torch.mm(gradient.T, hidden)


def fp32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight^T [..., V] in float32; bf16 would round different confidences to ties."""
    if hidden.dtype == torch.float32 or hidden.device.type not in ("cuda", "meta"):
        return F.linear(hidden.float(), weight.float())
    return Fp32Product.apply(hidden.flatten(0, -2), weight).view(*hidden.shape[:-1], -1)


class MaskedDiffusionAttention(nn.Module):
    """Self-attention over the whole sequence."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.head_dim
        hidden = config.hidden_size
        width, kv_width = self.heads * self.head_size, self.kv_heads * self.head_size
        self.q_proj = nn.Linear(hidden, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        normed = config.qk_norm
        self.q_norm = nn.RMSNorm(self.head_size, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_size, config.rms_norm_eps) if normed else nn.Identity()

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        remember: Remember | None = None,
    ) -> Tensor:
        """Return [B, L, H] for x [B, L, H].

        Args:
            x: the inputs.
            table: cosines and sines of their positions.
            attention_mask: broadcasts to [B, heads, L, L] bool.
            remember: adds cached keys and values of other positions.
        """
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.head_size))
        k = self.k_norm(self.k_proj(x).view(batch, length, self.kv_heads, self.head_size))
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_size)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, L, D]
        q, k, grouped = rotate(q, table), rotate(k, table), self.kv_heads != self.heads
        if remember is not None:
            k, v = remember(k, v)
        if grouped and attention_mask is not None:  # no fast GPU kernel supports both
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MaskedDiffusionMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, H] for x [B, L, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MaskedDiffusionBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MaskedDiffusionAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MaskedDiffusionMLP(config)

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        remember: Remember | None = None,
    ) -> Tensor:
        """Return [B, L, H] for x [B, L, H]; see `MaskedDiffusionAttention`."""
        x = x + self.self_attn(self.input_layernorm(x), table, attention_mask, remember)
        return x + self.mlp(self.post_attention_layernorm(x))


class MaskedDiffusionPreTrainedModel(PreTrainedModel):
    """Base class for transformers."""

    config_class = MaskedDiffusionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["MaskedDiffusionBlock"]


class MaskedDiffusionModel(MaskedDiffusionPreTrainedModel):
    """Maps tokens to hidden states."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"lm_head\.weight"]

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MaskedDiffusionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        blocks: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Tensor]:
        """Return hidden states [B, L, H].

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 at padding.
            blocks: [B or 1, L], block number of each position; a position does not attend to higher blocks.
                By default attention is bidirectional, or causal if config.attention is "causal".
            inputs_embeds: [B, L, H], in place of input_ids.
            return_dict: False returns a tuple.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        table = self.angles(x.shape[1], x.device)
        visible = self.visible(x, attention_mask, blocks)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, table, visible)
            else:
                x = layer(x, table, visible)
        x = self.norm(x)
        return (x,) if return_dict is False else BaseModelOutput(last_hidden_state=x)

    def angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [L, head_size] of the positions 0..L-1."""
        config = self.config
        rope = config.rope_theta, config.rope_factor, config.rope_original_length
        return rotary_table(length, config.head_dim, *rope, device)

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

    def visible(self, x: Tensor, attention_mask: Tensor | None, blocks: Tensor | None) -> Tensor | None:
        """Return the attention mask, broadcastable to [B, heads, L, L] bool; None = every key is visible."""
        if blocks is None and self.config.attention == "causal":
            blocks = torch.arange(x.shape[1], device=x.device)[None]
        elif blocks is None and self.config.attention == "blocks":
            raise ValueError(
                f"this model was trained in blocks of {self.config.block_size} tokens: give `blocks`, the "
                "number of each position's block, counted from 1, with 0 for the prompt."
            )
        keys = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        if blocks is None:
            return keys
        before = (blocks[:, None, :] <= blocks[:, :, None])[:, None]  # [B or 1, 1, L, L]
        return before if keys is None else before & keys


class MaskedDiffusionHead(nn.Linear):
    """The output matrix."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.mask_token_id, self.num_tokens = config.mask_token_id, config.num_tokens

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] float32 of hidden [..., H]; -inf at tokens that are never predicted."""
        logits = fp32_product(hidden, self.weight)
        logits[..., self.mask_token_id] = -torch.inf
        logits[..., self.num_tokens :] = -torch.inf
        return logits


class MaskedDiffusionForMaskedLM(MaskedDiffusionPreTrainedModel, MaskedDiffusionGenerationMixin):
    """Predicts p(x0 | xt), the distribution of each masked position given the visible tokens."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.model = MaskedDiffusionModel(config)
        self.lm_head = MaskedDiffusionHead(config)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take the weight of another output layer, such as a resized one; the head stays what it is."""
        self.lm_head.weight, self.lm_head.out_features = new_embeddings.weight, new_embeddings.out_features

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        blocks: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Return logits [B, L, V] float32; -inf for the mask token and for rows beyond the vocabulary.

        Args:
            input_ids: [B, L], with config.mask_token_id at the positions to fill in.
            attention_mask: [B, L], 0 at padding.
            labels: [B, L], true tokens at the positions of the loss and -100 elsewhere; the loss is the mean
                NLL in nats.
            blocks: see `MaskedDiffusionModel`.
            inputs_embeds: [B, L, H], in place of input_ids.
            return_dict: False returns a tuple.
        """
        hidden = self.model(input_ids, attention_mask, blocks, inputs_embeds).last_hidden_state
        if self.config.prediction == "shifted":  # the state at i - 1 predicts i; position 0 must be given
            hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        logits = self.lm_head(hidden)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)


__all__ = ["MaskedDiffusionForMaskedLM", "MaskedDiffusionModel", "MaskedDiffusionPreTrainedModel"]
