"""Exports in other projects' formats: their keys, their networks, and back again bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeline.base.errors import UserError
from pipeline.config import ModelConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.weights import StoredWeight
from pipeline.huggingface.export import write_model
from pipeline.huggingface.folders import open_weights
from pipeline.huggingface.formats import check
from pipeline.huggingface.mapping import Exported
from pipeline.huggingface.tokenizer_files import write_tokenizer
from pipeline.model.batch import Visibility, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from support.foreign import bring_in, llada_logits, rewrite
from support.foreign import write_tokenizer as write_characters
from support.programs import Outcome, run_here
from tools import export_hf, import_hf

pytestmark = pytest.mark.slow
BASE = ModelConfig(
    layers=2, hidden_size=32, heads=4, kv_heads=2, intermediate_size=48, rope_theta=5000.0, norm_eps=1e-5
)
# Format, what its network needs, attention, and transformers' class with the same network.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llada": ("llada", {"tie_embeddings": False}, "bidirectional", ""),
    "llada-biased": ("llada", {"attention_bias": True}, "bidirectional", ""),
    "dream": ("dream", {"attention_bias": True, "prediction": "shifted"}, "bidirectional", "Qwen2"),
    "sdar": ("sdar", {"qk_norm": True, "head_size": 12, "tie_embeddings": False}, "blocks", "Qwen3"),
    "a2d-qwen2": ("a2d", {"attention_bias": True}, "bidirectional", "Qwen2"),
    "a2d-qwen3": ("a2d", {"qk_norm": True, "prediction": "shifted"}, "blocks", "Qwen3"),
    "a2d-llama": (
        "a2d",
        {"rope_factor": 8.0, "rope_original_length": 64, "head_size": 12},
        "bidirectional",
        "Llama",
    ),
}
# The keys of config.json as the projects ship them, without transformers_version.
QWEN = """attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range
    intermediate_size max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads
    rms_norm_eps rope_scaling rope_theta tie_word_embeddings torch_dtype use_cache vocab_size architectures
    model_type""".split()
WINDOW = "max_window_layers sliding_window use_sliding_window".split()
SHIPPED = {
    # The config.json of LLaDA-8B; its keys are those of configuration_llada.py.
    "llada": """activation_type alibi alibi_bias_max architectures attention_dropout attention_layer_norm
        attention_layer_norm_with_affine auto_map bias_for_layer_norm block_group_size block_type d_model
        embedding_dropout embedding_size eos_token_id flash_attention include_bias include_qkv_bias
        init_cutoff_factor init_device init_fn init_std input_emb_norm layer_norm_type layer_norm_with_affine
        mask_token_id max_sequence_length mlp_hidden_size mlp_ratio model_type multi_query_attention n_heads
        n_kv_heads n_layers pad_token_id precision residual_dropout rms_norm_eps rope rope_full_precision
        rope_theta scale_logits use_cache vocab_size weight_tying""".split(),
    # Dream-v0-Base-7B: the arguments of configuration_dream.py, and what Qwen2.5's config.json has.
    "dream": [*QWEN, *WINDOW, "auto_map", "mask_token_id", "pad_token_id", "use_mrope"],
    # training/model/SDAR-4B-Chat/config.json of JetAstra/SDAR, without attn_implementation, the reader's
    # choice. Its padding token is in generation_config.json, but modeling_sdar.py reads config.json's.
    "sdar": [*QWEN, *WINDOW, "attention_bias", "auto_map", "block_size", "debug", "ep_size",
             "fuse_cross_entropy", "head_dim", "mask_token_id", "micro_forward", "skip_checkpoint",
             "use_deepep", "pad_token_id"],
    # dllm saves the settings of transformers' classes (dllm/pipelines/a2d/convert.py); the last two are ours.
    "a2d-qwen2": [*QWEN, *WINDOW, "pad_token_id", "mask_token_id", "attention_bias", "head_dim",
                  "right_shift_logits", "block_size"],
}  # fmt: skip
SHIPPED["a2d-qwen3"] = SHIPPED["a2d-qwen2"]
SHIPPED["a2d-llama"] = [*sorted({*SHIPPED["a2d-qwen2"]} - {*WINDOW}), "mlp_bias", "pretraining_tp"]
CLASSES = {
    "llada": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "dream": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
    "sdar": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
}
ARCHITECTURES = {
    "llada": ("llada", "LLaDAModelLM"),
    "dream": ("Dream", "DreamModel"),
    "sdar": ("sdar", "SDARForCausalLM"),
    "a2d-qwen2": ("a2d-qwen2", "A2DQwen2LMHeadModel"),
    "a2d-qwen3": ("a2d-qwen3", "A2DQwen3LMHeadModel"),
    "a2d-llama": ("a2d-llama", "A2DLlamaLMHeadModel"),
}
MASK, BLOCK = 96, 4


@pytest.fixture
def tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return a tokenizer of 98 tokens, in our format."""
    from pipeline.corpus.tokenizer_making import import_tokenizer

    write_characters(tmp_path / "characters.json")
    import_tokenizer(tmp_path / "characters.json", {}, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def exported_in(name: str, tokenizer: Path, folder: Path) -> tuple[MaskedDiffusionModel, Exported]:
    """Write the export of a random model; return both."""
    form, more, attention, _ = CASES[name]
    model, vocabulary = dataclasses.replace(BASE, **more), Vocabulary(104, 98, MASK)
    torch.manual_seed(0)
    network = MaskedDiffusionModel(model, vocabulary).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.2)
    block = BLOCK if attention == "blocks" else None
    exported = Exported(model, vocabulary, Tokenizer.load(tokenizer), 64, "float32", attention, block)
    check(form, exported)  # type: ignore[arg-type]
    weights = {name: StoredWeight.of(weight.detach()) for name, weight in network.named_parameters()}
    folder.mkdir()
    write_model(folder, form, exported, weights, 20_000)  # type: ignore[arg-type]
    write_tokenizer(tokenizer, folder, 64)
    return network, exported


@pytest.mark.parametrize("name", CASES)
def test_import_brings_back_every_bit(
    name: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, shape, block size, vocabulary and tokenizer."""
    network, exported = exported_in(name, tokenizer, tmp_path / "theirs")
    _, settings = bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    parameters = dict(network.named_parameters())
    weights = open_weights(tmp_path / "ours")
    assert weights.keys() == parameters.keys()
    assert all(torch.equal(weight.read(), parameters[key]) for key, weight in weights.items())
    model = dataclasses.replace(exported.model, vocab_size=104)
    assert ModelConfig(**settings["model"]) == model
    assert settings.get("objective", {}).get("block_size") == exported.block_size
    facts = json.loads((tmp_path / "ours/config.json").read_text())
    assert (facts["num_tokens"], facts["mask_token_id"], facts["vocab_size"]) == (98, MASK, 104)
    assert (facts["attention"], facts["max_position_embeddings"]) == (exported.attention, 64)
    assert Tokenizer.load(tmp_path / "ours/tokenizer").sha256 == exported.tokenizer.sha256
    arguments = [
        "--input",
        str(tmp_path / "theirs"),
        "--output",
        str(tmp_path / "again"),
        "--mask-token",
        "z",
    ]
    assert "leave the option out" in run_here(import_hf.main, arguments, capsys).complaint()
    assert (tmp_path / "ours/SHA256SUMS").is_file()
    shutil.rmtree(tmp_path / "theirs/tokenizer")  # and from tokenizer.json, as another project would save it
    bring_in(tmp_path / "theirs", tmp_path / "by_json", capsys)
    again = Tokenizer.load(tmp_path / "by_json/tokenizer")
    assert again.special_ids == exported.tokenizer.special_ids
    found = open_weights(tmp_path / "by_json")
    assert all(torch.equal(found[key].read(), parameters[key]) for key in parameters)


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_theirs(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """LLaDA's by NumPy; transformers loads the others as Qwen or Llama and gives our logits."""
    form, _, attention, family = CASES[name]
    network, exported = exported_in(name, tokenizer, tmp_path / "theirs")
    ids = torch.randint(1, 94, (2, 10), generator=torch.Generator().manual_seed(1))
    ids[:, 2::3] = MASK
    number = torch.arange(10) // (BLOCK if attention == "blocks" else 10)
    visibility = Visibility(number[None] if attention == "blocks" else None)
    ours = network.logits(ids, torch.arange(20), visibility=visibility).view(2, 10, -1)[..., :94]
    if form == "llada":
        weights = {
            key: tensor
            for path in (tmp_path / "theirs").glob("*.safetensors")
            for key, tensor in load_file(path).items()
        }
        config = json.loads((tmp_path / "theirs/config.json").read_text())
        theirs = torch.tensor(np.stack([llada_logits(weights, config, row.numpy()) for row in ids])).float()
    else:
        rewrite(tmp_path / "theirs", model_type=family.lower())
        model = getattr(transformers, f"{family}ForCausalLM").from_pretrained(tmp_path / "theirs")
        unseen = torch.zeros(10, 10).masked_fill(number > number[:, None], -torch.inf)
        with torch.no_grad():
            theirs = model(ids, attention_mask=unseen.expand(2, 1, -1, -1)).logits
        if exported.model.prediction == "shifted":
            theirs = torch.cat([theirs[:, :1], theirs[:, :-1]], dim=1)
    torch.testing.assert_close(ours, theirs[..., :94], atol=2e-5, rtol=2e-5)
    assert ours.std() > 0.2, "logits near 0 would compare nothing"


@pytest.mark.parametrize("name", [name for name in CASES if name != "llada-biased"])
def test_files_are_those_that_the_project_ships(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """Key by key; the code is named in the project's own repository."""
    exported_in(name, tokenizer, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert sorted(config) == sorted(SHIPPED[name])
    assert (config["model_type"], config["architectures"][0]) == ARCHITECTURES[name]
    places = {auto: place.split("--") for auto, place in config.get("auto_map", {}).items()}
    assert {auto: place[1] for auto, place in places.items()} == CLASSES.get(name, {})
    assert all("/" in place[0] for place in places.values())
    assert (config["mask_token_id"], config["pad_token_id"], config["eos_token_id"]) == (MASK, 97, 0)
    generation = json.loads((tmp_path / "theirs/generation_config.json").read_text())
    assert generation["suppress_tokens"] == [MASK, *range(98, 104)]
    if (
        name == "dream"
    ):  # the fields of DreamGenerationConfig (dllm/pipelines/dream/models/generation_utils.py)
        assert generation.keys() >= {"alg", "alg_temp", "eps", "mask_token_id", "output_history", "steps"}
    files = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert not any(file.endswith(".py") for file in files)
    assert files >= {"tokenizer.json", "tokenizer_config.json", "tokenizer"}
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "theirs")
    assert (loaded.mask_token_id, loaded("ab<mask>")["input_ids"][-1]) == (MASK, MASK)


def test_names_of_lladas_weights(tokenizer: Path, tmp_path: Path) -> None:
    """As in modeling_llada.py, with blocks of the kind "llama"."""
    exported_in("llada-biased", tokenizer, tmp_path / "theirs")
    parts = """attn_norm.weight attn_out.weight ff_norm.weight ff_out.weight ff_proj.weight up_proj.weight
        q_proj.weight k_proj.weight v_proj.weight q_proj.bias k_proj.bias v_proj.bias""".split()
    expected = {f"model.transformer.blocks.{layer}.{part}" for layer in (0, 1) for part in parts}
    expected |= {"model.transformer.wte.weight", "model.transformer.ln_f.weight"}  # the head is tied
    assert open_weights(tmp_path / "theirs").keys() == expected


@pytest.mark.parametrize(
    ("form", "more", "attention", "words"),
    [
        ("llada", {}, "blocks", "attention is blocks, but LLaDA's network has bidirectional"),
        ("llada", {}, "causal", "attention is causal"),
        ("llada", {"prediction": "shifted"}, "bidirectional", "model.prediction is shifted"),
        ("llada", {"qk_norm": True}, "bidirectional", "model.qk_norm is True, but LLaDA's network has False"),
        ("llada", {"head_size": 12}, "bidirectional", "model.head_size is 12, but LLaDA's network has 8:"),
        ("llada", {"rope_factor": 8.0}, "bidirectional", "model.rope_factor is 8.0, but"),
        ("dream", {"prediction": "shifted"}, "bidirectional", "model.attention_bias is False"),
        ("dream", {"attention_bias": True}, "bidirectional", "model.prediction is same"),
        ("sdar", {}, "blocks", "model.qk_norm is False, but SDAR's network has True"),
        ("sdar", {"qk_norm": True}, "bidirectional", "attention is bidirectional"),
        ("a2d", {"qk_norm": True, "attention_bias": True}, "blocks", "model.qk_norm is True"),
        ("a2d", {}, "causal", "dllm's network has bidirectional or blocks: export with --format own"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit(
    form: Any, more: dict[str, Any], attention: str, words: str, tokenizer: Path
) -> None:
    model, loaded = dataclasses.replace(BASE, **more), Tokenizer.load(tokenizer)
    exported = Exported(model, Vocabulary(104, 98, MASK), loaded, 64, "float32", attention, 4)
    with pytest.raises(UserError) as error:
        check(form, exported)
    assert words in str(error.value)
    assert f"--format {form}: " in str(error.value)


def test_the_program(
    train: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint with a SentencePiece tokenizer, to LLaDA's format and back; and what does not fit."""
    assert train(tmp_path / "run", "--train.steps", "2").code == 0
    arguments = ["--checkpoint", str(tmp_path / "run"), "--output"]
    done = run_here(export_hf.main, [*arguments, str(tmp_path / "llada"), "--format", "llada"], capsys)
    assert "format llada" in done.output
    refused = run_here(export_hf.main, [*arguments, str(tmp_path / "sdar"), "--format", "sdar"], capsys)
    assert "attention is bidirectional" in refused.complaint()
    assert not (tmp_path / "sdar").exists()
    assert run_here(export_hf.main, [*arguments, str(tmp_path / "own")], capsys).code == 0
    bring_in(tmp_path / "llada", tmp_path / "ours", capsys)
    expected, found = open_weights(tmp_path / "own"), open_weights(tmp_path / "ours")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].read(), weight.read()) for key, weight in expected.items())
    card = (tmp_path / "llada/README.md").read_text()
    for fact in (
        "AutoModel.from_pretrained",
        "in the format of LLaDA",
        "takes <|mdm_mask|> for the mask token",
    ):
        assert fact in card
    assert [path.name for path in (tmp_path / "llada").glob("*.py")] == ["tokenization_masked_diffusion.py"]
