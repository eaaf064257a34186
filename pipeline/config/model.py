"""Network settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import require, require_positive


@dataclass
class ModelConfig:
    """Transformer with the parameter names of Qwen2, Qwen3 and Llama.

    Args:
        layers: Transformer blocks.
        hidden_size: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads (grouped-query attention); null = heads.
        head_size: Width of a head; null = hidden_size / heads.
        intermediate_size: Width of the SwiGLU.
        vocab_size: Rows of the embedding; null = the tokenizer's vocabulary size, rounded up to a multiple
            of 8. With another number the rows of the logits are not aligned, and products slow on a GPU.
        tie_embeddings: Use the embedding as the output matrix.
        attention_bias: Add biases to the query, key and value projections (as in Qwen2).
        qk_norm: Apply RMSNorm to the queries and keys of each head (as in Qwen3).
        rope_theta: Base of the rotary position embedding.
        rope_factor: Slow down low-frequency rotations by this factor (Llama 3.1 uses 8, Llama 3.2 uses 32);
            1 = off.
        rope_original_length: Sequence length that separates low from high frequencies for rope_factor.
        norm_eps: Epsilon of RMSNorm.
        init_std: Standard deviation of the initial weights.
        prediction: Hidden state that predicts position i: same = the one at i; shifted = the one at i - 1,
            as in causal models whose weights can be imported. With shifted, position 0 is never masked.
    """

    layers: int = 4
    hidden_size: int = 128
    heads: int = 4
    kv_heads: int | None = None
    head_size: int | None = None
    intermediate_size: int = 384
    vocab_size: int | None = None
    tie_embeddings: bool = True
    attention_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_original_length: int = 8192
    norm_eps: float = 1e-6
    init_std: float = 0.02
    prediction: Literal["same", "shifted"] = "same"

    @property
    def head_width(self) -> int:
        """The width of a head: head_size, or its default."""
        return self.head_size or self.hidden_size // self.heads

    def rows_for(self, tokens: int) -> int:
        """Return the rows of the embedding for a tokenizer of `tokens` tokens."""
        return self.vocab_size or -(-tokens // 8) * 8

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        positive = (
            "layers",
            "hidden_size",
            "heads",
            "kv_heads",
            "head_size",
            "intermediate_size",
            "vocab_size",
        )
        require_positive(
            "model", self, *positive, "rope_theta", "rope_original_length", "norm_eps", "init_std"
        )
        require(
            self.init_std <= 0.5,
            f"model.init_std is {self.init_std}: an untrained model would be overconfident; give 0.5 "
            "or less, such as 0.02.",
        )
        require(
            self.rope_factor >= 1, f"model.rope_factor is {self.rope_factor}: it must be 1 (none) or more."
        )
        require(
            (self.head_size or 2) % 2 == 0,
            f"model.head_size is {self.head_size}: it must be even, because rotary embeddings rotate pairs "
            "of dimensions.",
        )
        require(
            self.head_size is not None or self.hidden_size % (2 * self.heads) == 0,
            f"model.hidden_size is {self.hidden_size}: it must be a multiple of 2 x model.heads = "
            f"{2 * self.heads}, because rotary embeddings rotate pairs of dimensions. Change it, or "
            "set model.head_size.",
        )
        require(
            self.heads % (self.kv_heads or self.heads) == 0,
            f"model.kv_heads is {self.kv_heads}: it must divide model.heads = {self.heads}.",
        )
