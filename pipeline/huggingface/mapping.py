"""Convert between the model section of a run and transformers' config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.base.errors import UserError
from pipeline.config import ModelConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.huggingface import llada
from pipeline.model.attention import FAST, SLOW
from pipeline.model.batch import Vocabulary

MODEL_TYPE = "masked_diffusion"


class Family(NamedTuple):
    """What a model_type says about a network besides its settings.

    Attributes:
        attention_bias: biases on queries, keys and values; None = by the setting.
        qk_norm: RMSNorm of each head's queries and keys.
        prediction: see `ModelConfig`; None = the folder does not say.
        is_diffusion: trained to fill in masks; otherwise causal.
    """

    attention_bias: bool | None = False
    qk_norm: bool = False
    prediction: Literal["same", "shifted"] | None = "same"
    is_diffusion: bool = True


QWEN2, QWEN3, LLAMA = Family(True, prediction=None), Family(False, True, None), Family(prediction=None)
FAMILIES = {
    "qwen2": QWEN2._replace(is_diffusion=False),
    "qwen3": QWEN3._replace(is_diffusion=False),
    "llama": LLAMA._replace(is_diffusion=False),
    "llada": Family(None),  # LLaDA (arXiv 2502.09992)
    "Dream": Family(True, prediction="shifted"),  # Dream 7B (arXiv 2508.15487)
    "sdar": Family(False, True),  # SDAR (arXiv 2510.06303)
    "a2d-qwen2": QWEN2,  # dllm
    "a2d-qwen3": QWEN3,
    "a2d-llama": LLAMA,
}
# Our names of the model settings -> names in config.json.
NAMES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "qk_norm": "qk_norm",
    "rope_theta": "rope_theta",
    "rope_factor": "rope_factor",
    "rope_original_length": "rope_original_length",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "prediction": "prediction",
}
# The sampler's settings that have other names in generation_config.json, those of LLaDA and transformers.
GENERATION_NAMES = {"block_size": "block_length", "cache": "use_cache"}
SHIFTED = "right_shift_logits"  # dllm's name of a setting that its folders do not have; ours do
NEEDED = ("layers", "hidden_size", "heads", "intermediate_size", "vocab_size")


class Exported(NamedTuple):
    """What an export says about its model in any format.

    Attributes:
        model: shape of the network.
        vocabulary: vocabulary of the model.
        tokenizer: tokenizer with the special tokens.
        sequence_length: tokens per training example.
        dtype: data type of the weights.
        attention: "bidirectional", "causal" or "blocks"; "" = the run that trains it first chooses.
        block_size: tokens of a block, with attention "blocks".
        data_kind: kind of the training data, "pairs" or "packed"; "" = unknown.
    """

    model: ModelConfig
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    sequence_length: int
    dtype: str
    attention: str = ""
    block_size: int | None = None
    data_kind: str = ""


def to_json(exported: Exported) -> dict[str, Any]:
    """Return the config.json of a model, for the code in `remote_code`."""
    model, vocabulary, tokenizer = exported.model, exported.vocabulary, exported.tokenizer
    settings = {theirs: getattr(model, ours) for ours, theirs in NAMES.items()}
    settings["vocab_size"] = vocabulary.rows
    settings["num_key_value_heads"] = model.kv_heads or model.heads
    settings["head_dim"] = model.head_width
    shown = {name: getattr(exported, name) for name in ("attention", "data_kind", "block_size")}
    return {
        "architectures": ["MaskedDiffusionForMaskedLM"],
        "auto_map": {
            "AutoConfig": "configuration_masked_diffusion.MaskedDiffusionConfig",
            "AutoModel": "modeling_masked_diffusion.MaskedDiffusionModel",
            "AutoModelForMaskedLM": "modeling_masked_diffusion.MaskedDiffusionForMaskedLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": exported.dtype,
        "num_tokens": vocabulary.tokens,
        "mask_token_id": vocabulary.mask_id,
        "pad_token_id": tokenizer.pad,
        "eos_token_id": tokenizer.eos,
        "max_position_embeddings": exported.sequence_length,
        **settings,
        **{name: value for name, value in shown.items() if value},
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a config.json; raise a `UserError` if it is missing or damaged."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give the folder of a Hugging Face model.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): download the folder again.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a JSON object: download the folder again.")
    return settings


def in_llama_keys(settings: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return the content of a config.json in the keys of Llama and Qwen; only LLaDA has others."""
    return llada.as_llama(settings, where) if settings.get("model_type") == llada.MODEL_TYPE else settings


def from_json(
    settings: dict[str, Any], where: Path, prediction: Literal["same", "shifted"] | None = None
) -> ModelConfig:
    """Return the model section that is equivalent to a config.json, apart from the attention mask.

    Args:
        settings: content of config.json, of a family in FAMILIES or of an exported model.
        where: path of the file, for error messages.
        prediction: of a family that leaves it open; None = shifted for a causal one, else same.

    Raises:
        UserError: if the architecture is not supported.
    """
    kind = settings.get("model_type")
    if kind not in (*FAMILIES, MODEL_TYPE):
        raise UserError(f"{where}: model_type is {kind!r}: choose one of {', '.join(FAMILIES)}.")
    settings = in_llama_keys(settings, where)
    found = {ours: settings[theirs] for ours, theirs in NAMES.items() if settings.get(theirs) is not None}
    for ours in NEEDED:
        if ours not in found:
            raise UserError(f"{where}: {NAMES[ours]} is missing: download the folder again.")
    for ours, value in found.items():
        if ours != "prediction" and not isinstance(value, int | float):
            raise UserError(f"{where}: {NAMES[ours]} is {value!r}, not a number: download the folder again.")
    if kind != MODEL_TYPE:
        family = FAMILIES[kind]
        _check_family(settings, family, where)
        if family.attention_bias is not None:
            found["attention_bias"] = family.attention_bias
        found |= {"qk_norm": family.qk_norm, "prediction": _prediction(settings, family, where, prediction)}
        found |= _rope(settings, where)
        found.setdefault("tie_embeddings", False)  # the families' own defaults
        if family.qk_norm:
            found.setdefault("head_size", 128)
    config = ModelConfig(**found)
    if config.head_size == config.hidden_size / config.heads:
        config.head_size = None
    config.check()
    return config


def _prediction(settings: dict[str, Any], family: Family, where: Path, given: str | None) -> str:
    """Return which hidden state predicts a position; raise a `UserError` if the family contradicts."""
    if family.prediction is not None:
        if given not in (None, family.prediction):
            raise UserError(
                f"--prediction is {given}, but {where} is of the kind {settings['model_type']}, which "
                f"predicts {family.prediction}: leave the option out."
            )
        return family.prediction
    shifted = bool(settings.get(SHIFTED)) or not family.is_diffusion
    return given or ("shifted" if shifted else "same")


def _check_family(settings: dict[str, Any], family: Family, where: Path) -> None:
    """Raise a `UserError` for a variant of a family that our blocks do not implement."""
    layer_types = set(settings.get("layer_types") or ["full_attention"])
    biased = family.attention_bias is False and bool(settings.get("attention_bias"))
    wrong = {
        "hidden_act": (settings.get("hidden_act", "silu") != "silu", "our MLP is a SwiGLU"),
        "attention_bias": (biased, "it adds a bias to the output projection, too"),
        "mlp_bias": (bool(settings.get("mlp_bias")), "our SwiGLU has no biases"),
        "use_sliding_window": (bool(settings.get("use_sliding_window")), "our attention has no window"),
        "layer_types": (layer_types != {"full_attention"}, "our layers all attend to everything"),
        "quantization_config": (
            settings.get("quantization_config") is not None,
            "our weights are not quantized",
        ),
    }
    for key, (is_wrong, reason) in wrong.items():
        if is_wrong:
            raise UserError(
                f"{where}: {key} = {settings[key]!r} is not supported ({reason}): choose another model."
            )


def _rope(settings: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return our rotary embedding settings, from the keys of transformers 5 or earlier."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    found = {"rope_theta": float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    bounds = (rope.get("low_freq_factor", SLOW), rope.get("high_freq_factor", FAST))
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or bounds != (SLOW, FAST) or partial != 1.0:
        raise UserError(
            f"{where}: the rotary embedding {rope or partial} is not supported: choose another model."
        )
    if kind == "llama3":
        if not isinstance(rope.get("factor"), int | float):
            raise UserError(
                f"{where}: the rotary embedding {rope} has no number as its factor: download it again."
            )
        length = rope.get("original_max_position_embeddings") or settings["max_position_embeddings"]
        found |= {"rope_factor": float(rope["factor"]), "rope_original_length": int(length)}
    return found
