"""Configuration of a masked diffusion language model."""

from typing import Any

from transformers import PretrainedConfig


class MaskedDiffusionConfig(PretrainedConfig):
    """Configuration of a transformer that fills in masked tokens.

    Args:
        vocab_size: rows of the embedding and the output matrix.
        num_tokens: tokens of the tokenizer; rows beyond them are padding and are never predicted.
        mask_token_id: id of the mask token, which is never predicted.
        pad_token_id: id of the padding token.
        eos_token_id: id of the end-of-sequence token.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: transformer blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: width of a head.
        attention_bias: biases on the query, key and value projections.
        qk_norm: RMSNorm of each head's queries and keys.
        rope_theta: base of the rotary position embedding.
        rope_factor: slow down low-frequency rotations by this factor, as in Llama 3.1; 1 = off.
        rope_original_length: sequence length that separates low from high frequencies for rope_factor.
        rms_norm_eps: epsilon of RMSNorm.
        initializer_range: standard deviation of new weights.
        max_position_embeddings: sequence length in training.
        tie_word_embeddings: use the embedding as the output matrix.
        prediction: hidden state that predicts position i: "same" = the one at i, "shifted" = at i - 1.
        attention: "bidirectional", "causal", or "blocks" = bidirectional in a block, causal between blocks.
        block_size: tokens per block for attention "blocks".
        data_kind: "pairs" = training had prompts, and blocks begin behind them; "packed" = they begin at the
            first token of a text.
    """

    model_type = "masked_diffusion"

    def __init__(
        self,
        vocab_size: int = 32000,
        num_tokens: int | None = None,
        mask_token_id: int = 3,
        pad_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        hidden_size: int = 128,
        intermediate_size: int = 384,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        attention_bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float = 10000.0,
        rope_factor: float = 1.0,
        rope_original_length: int = 8192,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool = True,
        prediction: str = "same",
        attention: str = "bidirectional",
        block_size: int | None = None,
        data_kind: str = "pairs",
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_tokens = num_tokens or vocab_size
        self.mask_token_id = mask_token_id
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.rope_theta = rope_theta
        self.rope_factor = rope_factor
        self.rope_original_length = rope_original_length
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.prediction = prediction
        self.attention = attention
        self.block_size = block_size
        self.data_kind = data_kind
        super().__init__(
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
