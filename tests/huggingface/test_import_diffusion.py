"""Imported diffusion models against transformers' own networks, and LLaDA's against NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import ModelConfig, load
from pipeline.data.examples import ANSWER, Examples
from pipeline.data.tokenizer import Tokenizer
from pipeline.huggingface.folders import open_weights
from pipeline.huggingface.initial import open_initial_weights
from pipeline.huggingface.loading import load_any
from pipeline.model.batch import Visibility, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from support.foreign import RESERVED, bring_in, llada_logits, rewrite, save
from support.programs import run_here
from tools import import_hf

pytestmark = pytest.mark.slow
LENGTH, ROWS, MASK = 11, 104, 95
IDS = {"mask_token_id": MASK, "eos_token_id": 0, "pad_token_id": 0}


def llada(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """Write a small random LLaDA; return its weights."""
    save(folder, "Llama", ROWS)  # for the tokenizer
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    config = {
        "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"],
        "attention_layer_norm": False,
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
        "embedding_size": ROWS, "include_bias": False, "include_qkv_bias": False, "init_std": 0.02,
        "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "max_sequence_length": 64, "mlp_hidden_size": 48, "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "rms_norm_eps": 1e-5, "rope": True,
        "rope_full_precision": True, "rope_theta": 5000.0, "scale_logits": False, "vocab_size": ROWS,
        "weight_tying": False, **IDS,
    } | more  # fmt: skip
    shapes = {"wte.weight": (ROWS, 32), "ln_f.weight": (32,), "ff_out.weight": (ROWS, 32)}
    if config["weight_tying"]:
        del shapes["ff_out.weight"]
    for layer in range(2):
        parts: dict[str, tuple[int, ...]] = {"attn_norm": (32,), "ff_norm": (32,), "attn_out": (32, 32)}
        if config["block_type"] == "llama":
            parts |= {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "ff_proj": (48, 32),
                      "up_proj": (48, 32), "ff_out": (32, 48)}  # fmt: skip
        else:
            parts |= {"att_proj": (64, 32), "ff_proj": (96, 32), "ff_out": (32, 48)}
        shapes |= {f"blocks.{layer}.{part}.weight": shape for part, shape in parts.items()}
        for part in ("q_proj", "k_proj", "v_proj", "att_proj"):
            if config["include_qkv_bias"] and part in parts:
                shapes[f"blocks.{layer}.{part}.bias"] = parts[part][:1]
    torch.manual_seed(0)
    weights = {
        f"model.transformer.{name}": torch.randn(shape) * 0.2 + (0.3 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def our_logits(folder: Path, settings: dict[str, Any], ids: torch.Tensor, blocks: torch.Tensor | None) -> Any:
    """Return the logits [B, L, V] of an imported model, loaded as a run would load it."""
    model = ModelConfig(**settings["model"])
    tokens = json.loads((folder / "config.json").read_text())["num_tokens"]
    vocabulary = Vocabulary(model.rows_for(tokens), tokens, MASK)
    weights = open_initial_weights(folder, model, vocabulary, Path(settings["data"]["tokenizer"]))
    ours = MaskedDiffusionModel(model, vocabulary).eval()
    state = {name: weight.read() for name, weight in weights.items()}
    ours.load_state_dict({"lm_head.weight": state["model.embed_tokens.weight"]} | state)
    return ours.logits(ids, torch.arange(ids.numel()), visibility=Visibility(blocks)).view(*ids.shape, -1)


def masked_ids() -> torch.Tensor:
    ids = torch.randint(1, 94, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 2::3] = MASK
    return ids


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weight_tying": True, "include_qkv_bias": True},
        {
            "block_type": "sequential",
            "activation_type": "swiglu",
            "mlp_hidden_size": 96,
            "include_qkv_bias": True,
        },
    ],
    ids=["llama-blocks", "tied-and-biased", "fused"],
)
def test_llada_logits(more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, halves of a fused projection, and the shape; each weight is a copy, bit for bit."""
    weights = llada(tmp_path / "theirs", **more)
    outcome, settings = bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    assert f"the mask token is {RESERVED[1]}, id {MASK}" in outcome.output
    assert "model.prediction is same" in outcome.output
    assert "annealing" not in outcome.output
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    ids = masked_ids()
    found = our_logits(tmp_path / "ours", settings, ids, None)
    expected = np.stack([llada_logits(weights, config, row.numpy()) for row in ids])
    np.testing.assert_allclose(found[..., :94], expected[..., :94], atol=2e-5, rtol=2e-5)
    assert expected.std() > 0.2, "logits near 0 would compare nothing"
    copied = b"".join(sorted(w.read().numpy().tobytes() for w in open_weights(tmp_path / "ours").values()))
    original = b"".join(sorted(w.numpy().tobytes() for w in weights.values()))
    assert len(copied) == len(original)
    if "block_type" not in more:
        assert copied == original


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("kind", "family", "more", "prediction", "block"),
    [
        ("Dream", "Qwen2", {}, "shifted", None),
        ("sdar", "Qwen3", {"block_size": 4}, "same", 4),
        ("a2d-qwen2", "Qwen2", {}, "same", None),
        ("a2d-qwen3", "Qwen3", {}, "same", None),
        ("a2d-llama", "Llama", {}, "same", None),
    ],
)
def test_logits_are_those_of_transformers(
    kind: str,
    family: str,
    more: dict[str, Any],
    prediction: str,
    block: int | None,
    tie: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same weights in transformers' network, with a mask that is bidirectional or by blocks."""
    theirs = save(tmp_path / "theirs", family, ROWS, tie_word_embeddings=tie)
    rewrite(tmp_path / "theirs", model_type=kind, **IDS, **more)
    outcome, settings = bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    assert f"model.prediction is {prediction}" in outcome.output
    assert settings["model"]["prediction"] == prediction
    assert settings.get("objective") == (None if block is None else {"block_size": 4})
    facts = json.loads((tmp_path / "ours/config.json").read_text())
    assert (facts["attention"], facts.get("block_size")) == ("blocks" if block else "bidirectional", block)
    ids, number = masked_ids(), torch.arange(LENGTH) // (block or LENGTH)
    unseen = torch.zeros(LENGTH, LENGTH).masked_fill(number > number[:, None], -torch.inf)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=unseen.expand(3, 1, -1, -1)).logits
    if prediction == "shifted":
        expected = torch.cat([expected[:, :1], expected[:, :-1]], dim=1)  # as Dream shifts them
    found = our_logits(tmp_path / "ours", settings, ids, None if block is None else number[None])
    torch.testing.assert_close(found[..., :94], expected[..., :94], atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.3
    loaded = load_any(tmp_path / "ours", torch.device("cpu"))  # as the programs that decode and measure do
    assert loaded.config.data.kind == ("packed" if block else "pairs"), "blocks begin at the first token"
    seen = loaded.layout.decoding(Examples(ids, torch.full_like(ids, ANSWER), torch.arange(3)))
    logits = loaded.model.logits(ids, torch.arange(ids.numel()), None, seen).view(*ids.shape, -1)
    torch.testing.assert_close(logits[..., :94], expected[..., :94], atol=1e-5, rtol=1e-5)
    weights = {name: weight.read() for name, weight in open_weights(tmp_path / "ours").items()}
    expected_names = {n for n in theirs.state_dict() if not (tie and n == "lm_head.weight")}
    assert weights.keys() == expected_names
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in weights.items())


def test_a_run_takes_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """model.yaml is a configuration that the trainer accepts."""
    save(tmp_path / "theirs", "Qwen3", ROWS)
    rewrite(tmp_path / "theirs", model_type="sdar", **IDS)
    bring_in(tmp_path / "theirs", tmp_path / "ours", capsys, "--block-size", "4")
    arguments = ["--config", str(tmp_path / "ours/model.yaml"), "--run_dir", "x", "--data.prefixes", "[x]"]
    config = load(arguments)
    assert (config.objective.block_size, config.model.prediction, config.model.qk_norm) == (4, "same", True)


@pytest.mark.parametrize(
    ("kind", "given", "found"), [("a2d-qwen2", "shifted", "shifted"), ("qwen2", "same", "same")]
)
def test_a_prediction_that_the_folder_leaves_open(
    kind: str, given: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "theirs", "Qwen2", ROWS)
    rewrite(tmp_path / "theirs", model_type=kind, **IDS)
    _, settings = bring_in(tmp_path / "theirs", tmp_path / "ours", capsys, "--prediction", given)
    assert settings["model"]["prediction"] == found
    assert json.loads((tmp_path / "ours/config.json").read_text())["prediction"] == found


def test_special_tokens_are_those_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By id in config.json, else by name in tokenizer_config.json; an option overrides both."""
    folder = tmp_path / "theirs"
    save(folder, "Qwen2", ROWS)
    rewrite(folder, model_type="a2d-qwen2", eos_token_id=[0, 5], pad_token_id=94)
    arguments = ["--input", str(folder), "--output", str(tmp_path / "ours")]
    assert "does not name its mask token" in run_here(import_hf.main, arguments, capsys).complaint()
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": RESERVED[1]}}))
    bring_in(folder, tmp_path / "named", capsys)
    rewrite(folder, mask_token_id=200)
    found = run_here(import_hf.main, arguments, capsys).complaint()
    assert "mask_token_id is 200" in found
    rewrite(folder, mask_token_id=94, pad_token_id=95)
    bring_in(folder, tmp_path / "by_id", capsys)
    bring_in(folder, tmp_path / "given", capsys, "--mask-token", RESERVED[1], "--pad-token", RESERVED[0])
    for name, mask, pad in (("named", 95, 94), ("by_id", 94, 95), ("given", 95, 94)):
        tokenizer = Tokenizer.load(tmp_path / name / "tokenizer")
        assert (tokenizer.mask, tokenizer.pad, tokenizer.eos) == (mask, pad, 0), name


def test_a_mask_token_that_was_there_keeps_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only rows that the matrix lacks are new: here that of the padding token."""
    theirs = save(tmp_path / "theirs", "Qwen2", 96)
    rewrite(tmp_path / "theirs", model_type="Dream", **IDS)
    outcome, _ = bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    assert "added tokens: <pad>; the embeddings of rows that were there are unchanged" in outcome.output
    old = theirs.model.embed_tokens.weight.detach()
    new = open_weights(tmp_path / "ours")["model.embed_tokens.weight"].read()
    assert torch.equal(new[:96], old)
    torch.testing.assert_close(new[96], old.mean(0))
    assert not new[97:].any()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True), ("multi_query_attention", True), ("clip_qkv", 8.0), ("attention_layer_norm", True),
        ("input_emb_norm", True), ("layer_norm_type", "default"), ("layer_norm_type", "gemma_rms"),
        ("layer_norm_with_affine", False), ("bias_for_layer_norm", True), ("include_bias", True),
        ("scale_logits", True), ("block_group_size", 2), ("block_type", "parallel"), ("rope", False),
        ("rope_full_precision", False), ("rope_scaling", {"type": "linear"}), ("activation_type", "gelu"),
        ("activation_type", "swiglu"), ("quantization_config", {"bits": 4}),
    ],
)  # fmt: skip
def test_a_llada_that_is_built_in_another_way(
    key: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message has file, key, value and reason."""
    llada(tmp_path / "theirs", **{key: value})
    arguments = ["--input", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]
    found = run_here(import_hf.main, arguments, capsys).complaint()
    assert f"{tmp_path / 'theirs/config.json'}: {key} = {value!r} is not supported (" in found
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("kind", "change", "options", "words"),
    [
        ("Dream", {}, ["--prediction", "same"], "which predicts shifted"),
        ("sdar", {"block_size": 4}, ["--prediction", "shifted"], "which predicts same"),
        ("sdar", {}, [], "no block_size: give the tokens of a block with --block-size"),
        ("a2d-qwen3", {"block_size": "4"}, [], "block_size is '4'"),
        ("Dream", {}, ["--block-size", "4"], "which has no blocks"),
        ("sdar", {"block_size": 4, "attention_bias": True}, [], "attention_bias = True is not"),
        ("Dream", {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, [], "yarn"),
        ("a2d-qwen2", {"use_sliding_window": True}, [], "use_sliding_window = True"),
        ("Dream", {"hidden_act": "gelu"}, [], "hidden_act = 'gelu'"),
    ],
)  # fmt: skip
def test_what_is_refused(
    kind: str,
    change: dict[str, Any],
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path / "theirs", "Qwen2" if kind in ("Dream", "a2d-qwen2") else "Qwen3", ROWS)
    rewrite(tmp_path / "theirs", model_type=kind, **IDS, **change)
    arguments = ["--input", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours"), *options]
    assert words in run_here(import_hf.main, arguments, capsys).complaint()


def test_a_weight_that_nothing_announces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bias of the output projection would be lost without a word."""
    llada(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    save_file(load_file(path) | {"model.transformer.blocks.0.attn_out.bias": torch.ones(32)}, path)
    arguments = ["--input", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]
    found = run_here(import_hf.main, arguments, capsys).complaint()
    assert "the weight model.layers.0.self_attn.o_proj.bias has no place in our blocks" in found


def test_no_code_of_the_folder_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Configuration and safetensors are all that is read."""
    folder = tmp_path / "theirs"
    llada(folder, auto_map={"AutoConfig": "configuration_llada.LLaDAConfig"})
    for name in ("configuration_llada.py", "modeling_llada.py", "__init__.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    bring_in(folder, tmp_path / "ours", capsys)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "ours").glob("*.py"))
