"""LLaDA's names of settings and weights (those of OLMo), as Llama's and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.config import ModelConfig
from pipeline.engine.weights import StoredWeight, StoredWeights

MODEL_TYPE = "llada"
# Llama's names of the settings -> LLaDA's.
SETTINGS = {
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "tie_word_embeddings": "weight_tying",
    "attention_bias": "include_qkv_bias",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "init_std",
    "max_position_embeddings": "max_sequence_length",
    "mask_token_id": "mask_token_id",
    "pad_token_id": "pad_token_id",
    "eos_token_id": "eos_token_id",
}
DEFAULTS = {"weight_tying": True, "rms_norm_eps": 1e-5}  # of LLaDAConfig, where they differ from Llama's
# Setting -> its default in LLaDAConfig, the values that our blocks have, and what another one would mean.
SUPPORTED: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "block_type": ("sequential", ("llama", "sequential"), "our blocks run attention before the SwiGLU"),
    "rope": (False, (True,), "our positions are rotary"),
    "rope_full_precision": (True, (True,), "our rotary embedding is computed in fp32"),
    "rope_scaling": (None, (None,), "it would scale the rotary positions"),
    "alibi": (False, (False,), "our attention has no position bias"),
    "multi_query_attention": (None, (None, False), "the number of key and value heads is n_kv_heads"),
    "clip_qkv": (None, (None,), "our queries, keys and values are not clipped"),
    "attention_layer_norm": (False, (False,), "our norms of queries and keys are per head, these are not"),
    "input_emb_norm": (False, (False,), "our embeddings are not scaled"),
    "layer_norm_type": ("default", ("rms",), "our norms are RMSNorm"),
    "layer_norm_with_affine": (True, (True,), "our norms have weights"),
    "bias_for_layer_norm": (None, (None, False), "our norms have no biases"),
    "include_bias": (False, (False,), "only our query, key and value projections have biases"),
    "scale_logits": (False, (False,), "our logits are not scaled"),
    "block_group_size": (1, (1,), "our blocks are not grouped"),
    "quantization_config": (None, (None,), "our weights are not quantized"),
}
WHOLE = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def as_llama(settings: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return a LLaDA config.json in the keys of Llama's.

    Args:
        settings: content of config.json.
        where: path of the file, for error messages.

    Raises:
        UserError: for a variant that our blocks do not implement.
    """
    for key, (default, supported, reason) in SUPPORTED.items():
        if settings.get(key, default) not in supported:
            _refuse(where, key, settings.get(key, default), reason)
    fused = is_fused(settings)
    activation = settings.get("activation_type", "swiglu")
    if activation != ("swiglu" if fused else "silu"):
        _refuse(where, "activation_type", activation, "with this block_type it would not give a SwiGLU")
    found = {llama: settings[own] for llama, own in SETTINGS.items() if settings.get(own) is not None}
    for key, value in DEFAULTS.items():
        found.setdefault({own: llama for llama, own in SETTINGS.items()}[key], value)
    if "vocab_size" not in found and settings.get("vocab_size") is not None:
        found["vocab_size"] = settings["vocab_size"]
    if "intermediate_size" not in found and "hidden_size" in found:
        found["intermediate_size"] = settings.get("mlp_ratio", 4) * found["hidden_size"]
    if fused and isinstance(found.get("intermediate_size"), int):
        found["intermediate_size"] //= 2  # that of both halves
    return {"model_type": MODEL_TYPE, **found}


def _refuse(where: Path, key: str, value: Any, reason: str) -> None:
    raise UserError(f"{where}: {key} = {value!r} is not supported ({reason}): choose another model.")


def is_fused(settings: dict[str, Any]) -> bool:
    """Return whether att_proj holds queries, keys and values, and ff_proj both halves of the SwiGLU."""
    return bool(settings.get("block_type", "sequential") == "sequential")


def own_name(name: str) -> str:
    """Return LLaDA's name of one of our weights."""
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"model.transformer.blocks.{layer}.{IN_LAYER[module]}.{kind}"


def renamed(stored: StoredWeights, model: ModelConfig) -> dict[str, StoredWeight]:
    """Return LLaDA's weights under our names; names that LLaDA does not have stay as they are."""
    if "transformer.wte.weight" in stored:  # saved without the class around it
        stored = {f"model.{name}": weight for name, weight in stored.items()}
    queries = model.heads * model.head_width
    keys = (model.kv_heads or model.heads) * model.head_width
    fused = {
        "att_proj": (("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)),
        "ff_proj": (("mlp.up_proj", model.intermediate_size), ("mlp.gate_proj", model.intermediate_size)),
    }
    both_halves = "model.transformer.blocks.0.att_proj.weight" in stored
    whole = {own: ours for ours, own in WHOLE.items()}
    modules = {own: ours for ours, own in IN_LAYER.items()}
    found: dict[str, StoredWeight] = {}
    for name, weight in stored.items():
        match = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match is None:
            found[whole.get(name, name)] = weight
            continue
        layer, module, kind = match.groups()
        if both_halves and module in fused:
            start = 0
            for part, rows in fused[module]:
                found[f"model.layers.{layer}.{part}.{kind}"] = _rows(weight, start, rows)
                start += rows
        else:
            found[f"model.layers.{layer}.{modules.get(module, module)}.{kind}"] = weight
    return found


def _rows(weight: StoredWeight, start: int, rows: int) -> StoredWeight:
    """Return rows of a fused weight; the shape is that of what is there, so that a short one is noticed."""

    def read() -> Tensor:
        return weight.read()[start : start + rows].clone()

    there = max(0, min(rows, weight.shape[0] - start))
    return StoredWeight((there, *weight.shape[1:]), weight.dtype, read)
