"""Formats of other projects that an export can have: which models fit, config.json, names of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, get_args

from pipeline.base.errors import UserError
from pipeline.decoding.sampling import SamplingSettings
from pipeline.huggingface import llada
from pipeline.huggingface.mapping import GENERATION_NAMES, SHIFTED, Exported
from pipeline.model.attention import FAST, SLOW

Format = Literal["own", "llada", "dream", "sdar", "a2d"]
FORMATS: tuple[Format, ...] = get_args(Format)


class Project(NamedTuple):
    """A project whose code loads the folder.

    Attributes:
        name: for texts.
        code: the hub repository with the code that config.json points to; None = the package `dllm`.
        mask: the name that dllm gives to the mask token of this format; None = any.
        attention, prediction, attention_bias, qk_norm: values that its network has.
        free_heads: heads may have another width than hidden size / heads.
        scales_rope: it knows Llama 3's scaling of rotary positions.
    """

    name: str
    code: str | None
    mask: str | None
    attention: tuple[str, ...]
    prediction: tuple[str, ...]
    attention_bias: tuple[bool, ...]
    qk_norm: tuple[bool, ...]
    free_heads: bool = True
    scales_rope: bool = True


EITHER = (False, True)
PROJECTS = {
    "llada": Project(
        "LLaDA", "GSAI-ML/LLaDA-8B-Base", "<|mdm_mask|>", ("bidirectional",), ("same",), EITHER, (False,),
        free_heads=False, scales_rope=False,
    ),
    "dream": Project(
        "Dream", "Dream-org/Dream-v0-Base-7B", None, ("bidirectional",), ("shifted",), (True,), (False,),
        free_heads=False,
    ),
    "sdar": Project("SDAR", "JetLM/SDAR-1.7B-Chat", None, ("blocks",), ("same",), (False,), (True,)),
    "a2d": Project(
        "dllm", None, "<|mask|>", ("bidirectional", "blocks"), ("same", "shifted"), EITHER, EITHER
    ),
}  # fmt: skip


def check(form: Format, exported: Exported) -> None:
    """Raise a `UserError` if a model cannot be written in a format, with the reason."""
    if form == "own":
        return
    project, model = PROJECTS[form], exported.model
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "attention": (exported.attention, project.attention),
        "model.prediction": (model.prediction, project.prediction),
        "model.attention_bias": (model.attention_bias, project.attention_bias),
        "model.qk_norm": (model.qk_norm, project.qk_norm),
    }
    if not project.free_heads:
        found["model.head_size"] = (model.head_width, (model.hidden_size / model.heads,))
    if not project.scales_rope:
        found["model.rope_factor"] = (model.rope_factor, (1.0,))
    if form == "a2d" and model.attention_bias:  # with norms and biases it would be neither Qwen2 nor Qwen3
        found["model.qk_norm"] = (model.qk_norm, (False,))
    for key, (value, possible) in found.items():
        if value not in possible:
            wanted = " or ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in possible)
            raise UserError(
                f"--format {form}: {key} is {value}, but {project.name}'s network has {wanted}: export with "
                "--format own."
            )


def settings(form: Format, exported: Exported) -> dict[str, Any]:
    """Return the config.json in the format of another project, with the keys that it ships."""
    return {"llada": _llada, "dream": _dream, "sdar": _sdar, "a2d": _a2d}[form](exported)


def generation_settings(form: Format, exported: Exported) -> dict[str, Any]:
    """Return the generation_config.json: the defaults of `generate` in `remote_code`, or of another project.

    The mask token and rows beyond the tokens are never targets, so nothing has taught the model not to
    predict them. Our head leaves them out; other code must suppress them.
    """
    tokenizer, vocabulary = exported.tokenizer, exported.vocabulary
    found: dict[str, Any] = {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    if form == "own":
        sampler = {GENERATION_NAMES.get(key, key): value for key, value in asdict(SamplingSettings()).items()}
        # transformers has other defaults for these, and warns of a temperature without do_sample.
        off = {"max_new_tokens": None, "top_k": 0, "top_p": 1.0, "do_sample": True}
        return found | sampler | off
    found |= {
        "_from_model_config": True,
        "suppress_tokens": [vocabulary.mask_id, *range(vocabulary.tokens, vocabulary.rows)],
    }
    if form == "dream":
        found |= {"alg": "maskgit_plus", "alg_temp": None, "eps": 1e-3, "mask_token_id": vocabulary.mask_id}
        found |= {"output_history": False, "steps": 512, "temperature": 0.0, "top_k": None, "top_p": None}
    return found


def name_of(form: Format) -> Callable[[str], str]:
    """Return the function from our names of weights to a format's."""
    return llada.own_name if form == "llada" else lambda name: name


def _special_ids(exported: Exported) -> dict[str, int]:
    tokenizer = exported.tokenizer
    ids = {"mask_token_id": tokenizer.mask, "pad_token_id": tokenizer.pad}
    return ids | {"eos_token_id": tokenizer.eos}


def _code(form: str, **classes: str) -> dict[str, str]:
    """Return the auto_map: classes in the project's hub repository, since its code is not copied."""
    return {auto: f"{PROJECTS[form].code}--{name}" for auto, name in classes.items()}


def _llada(exported: Exported) -> dict[str, Any]:
    model = exported.model
    ours = {
        **_shape(exported),
        **_special_ids(exported),
        "attention_bias": model.attention_bias,
        "rope_theta": model.rope_theta,
    }
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": _code(
            "llada",
            AutoConfig="configuration_llada.LLaDAConfig",
            AutoModelForCausalLM="modeling_llada.LLaDAModelLM",
            AutoModel="modeling_llada.LLaDAModelLM",
        ),
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "flash_attention": False,
        "include_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mlp_ratio": 4,
        "model_type": llada.MODEL_TYPE,
        "multi_query_attention": None,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": exported.vocabulary.rows,
        **{own: ours[llama] for llama, own in llada.SETTINGS.items()},
    }


def _shape(exported: Exported) -> dict[str, Any]:
    """Return the settings that Qwen and Llama share."""
    model = exported.model
    return {
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": exported.sequence_length,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads or model.heads,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": exported.vocabulary.rows,
    }


def _qwen(exported: Exported) -> dict[str, Any]:
    """Return the settings that Dream, SDAR and dllm share."""
    model = exported.model
    scaled = {
        "rope_type": "llama3",
        "factor": model.rope_factor,
        "low_freq_factor": SLOW,
        "high_freq_factor": FAST,
        "original_max_position_embeddings": model.rope_original_length,
    }
    return {
        **_shape(exported),
        **_special_ids(exported),
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "hidden_act": "silu",
        "rope_scaling": None if model.rope_factor == 1 else scaled,
        "rope_theta": model.rope_theta,
        "torch_dtype": exported.dtype,
        "use_cache": False,
    }


def _window(exported: Exported) -> dict[str, Any]:
    """Return Qwen's settings of its attention window, which is not used."""
    return {"max_window_layers": exported.model.layers, "sliding_window": None, "use_sliding_window": False}


def _dream(exported: Exported) -> dict[str, Any]:
    return {
        "architectures": ["DreamModel"],
        "auto_map": _code(
            "dream", AutoConfig="configuration_dream.DreamConfig", AutoModel="modeling_dream.DreamModel"
        ),
        "model_type": "Dream",
        "use_mrope": False,
        **_qwen(exported),
        **_window(exported),
    }


def _sdar(exported: Exported) -> dict[str, Any]:
    return {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "auto_map": _code(
            "sdar",
            AutoConfig="configuration_sdar.SDARConfig",
            AutoModel="modeling_sdar.SDARModel",
            AutoModelForCausalLM="modeling_sdar.SDARForCausalLM",
        ),
        "block_size": exported.block_size,
        "debug": False,
        "ep_size": 1,
        "fuse_cross_entropy": False,
        "head_dim": exported.model.head_width,
        "micro_forward": False,
        "model_type": "sdar",
        "skip_checkpoint": False,
        "use_deepep": False,
        **_qwen(exported),
        **_window(exported),
    }


def _a2d(exported: Exported) -> dict[str, Any]:
    model = exported.model
    kind = "qwen2" if model.attention_bias else "qwen3" if model.qk_norm else "llama"
    found = {
        "architectures": [f"A2D{kind.capitalize()}LMHeadModel"],
        "attention_bias": model.attention_bias,
        "head_dim": model.head_width,
        "model_type": f"a2d-{kind}",
        **_qwen(exported),
        # Two facts that dllm's own folders leave to the options of its programs.
        SHIFTED: model.prediction == "shifted",
        "block_size": exported.block_size,
    }
    return found | (_window(exported) if kind != "llama" else {"mlp_bias": False, "pretraining_tp": 1})
