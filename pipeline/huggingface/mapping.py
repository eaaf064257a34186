"""The settings of a run in the words of transformers' config.json."""

from __future__ import annotations

from typing import Any

from pipeline.config import Config
from pipeline.data.tokenizer import Tokenizer
from pipeline.model.batch import Vocabulary

MODEL_TYPE = "masked_diffusion"


def config_json(config: Config, vocabulary: Vocabulary, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the config.json of a trained model, for the code in `remote_code`."""
    model = config.model
    return {
        "architectures": ["MaskedDiffusionForMaskedLM"],
        "auto_map": {
            "AutoConfig": "configuration_masked_diffusion.MaskedDiffusionConfig",
            "AutoModel": "modeling_masked_diffusion.MaskedDiffusionModel",
            "AutoModelForMaskedLM": "modeling_masked_diffusion.MaskedDiffusionForMaskedLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": vocabulary.rows,
        "num_tokens": vocabulary.tokens,
        "mask_token_id": vocabulary.mask_id,
        "pad_token_id": tokenizer.pad,
        "eos_token_id": tokenizer.eos,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.head_width,
        "attention_bias": model.attention_bias,
        "qk_norm": model.qk_norm,
        "rope_theta": model.rope_theta,
        "rope_factor": model.rope_factor,
        "rope_original_length": model.rope_original_length,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": config.data.sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
    }
