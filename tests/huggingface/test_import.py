"""Imported models against transformers' own, and runs that start from them, weight for weight."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline import train
from pipeline.base.errors import UserError
from pipeline.config import ModelConfig
from pipeline.huggingface.folders import check_sums, open_weights
from pipeline.huggingface.initial import open_initial_weights
from pipeline.model.batch import EVERYTHING, Visibility, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from support.foreign import RESERVED, bring_in, save
from support.forked import run_forked
from support.programs import run_here
from support.runs import KEYS, command
from support.weights import read_weights
from tools import export_hf, import_hf, preprocess_data

pytestmark = pytest.mark.slow
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 12}),
        ("Llama", {}),
        ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ],
    ids=["Qwen2", "Qwen3", "Llama", "Llama-3.1"],
)
def test_logits_are_those_of_transformers(
    family: str, more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both causal, and given a mask that lets every position see every other; M is never predicted."""
    theirs = save(tmp_path / "theirs", family, **more)
    outcome, settings = bring_in(tmp_path / "theirs", tmp_path / "ours", capsys, "--max-shard-size", "20KB")
    assert yaml.safe_dump(settings, sort_keys=False) in outcome.output
    assert "objective.attention_annealing_steps" in outcome.output
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    model = ModelConfig(**settings["model"])
    vocabulary = Vocabulary(104, 98, 96)
    weights = open_initial_weights(tmp_path / "ours", model, vocabulary, Path(settings["data"]["tokenizer"]))
    ours = MaskedDiffusionModel(model, vocabulary).eval()
    state = {name: weight.read() for name, weight in weights.items()}
    ours.load_state_dict({"lm_head.weight": state["model.embed_tokens.weight"]} | state)
    ids = torch.randint(1, 96, (3, 11), generator=torch.Generator().manual_seed(1))
    everything = {"attention_mask": torch.zeros(3, 1, 11, 11)}
    for visibility, mask in ((EVERYTHING, everything), (Visibility(torch.arange(11)[None]), {})):
        with torch.no_grad():
            expected = theirs(ids, **mask).logits[:, :-1, :96]  # what is predicted for positions 1 to 10
            logits = ours.logits(ids, torch.arange(33), visibility=visibility).view(3, 11, -1)
        torch.testing.assert_close(logits[:, 1:, :96], expected, atol=1e-5, rtol=1e-5)
        assert expected.std() > 0.3, "logits near 0 would compare nothing"
    assert (logits[..., [96, *range(98, 104)]] == -torch.inf).all()


@pytest.mark.parametrize(("rows", "new_rows"), [(96, 104), (101, 104), (120, 120)])
def test_new_tokens_start_at_the_mean(
    rows: int, new_rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mask and padding take rows that were free, or new ones; all else is copied, bit for bit, in bf16."""
    theirs = save(tmp_path / "theirs", "Llama", rows, dtype=torch.bfloat16)
    theirs.bfloat16().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    outcome, settings = bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    assert f"98 tokens in {new_rows} rows of the embedding (before: {rows})" in outcome.output
    assert "the mask token is <mask>, id 96" in outcome.output
    assert "added tokens: <mask>, <pad>" in outcome.output
    assert settings["model"]["vocab_size"] == new_rows
    weights = {name: weight.read() for name, weight in open_weights(tmp_path / "ours").items()}
    for name, old in theirs.state_dict().items():
        new = weights[name]
        assert new.dtype == torch.bfloat16
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = old[:96].double().numpy().mean(0)
            for token in (96, 97):
                np.testing.assert_allclose(new[token].double(), mean, rtol=2**-8)
            assert torch.equal(new[:96], old[:96])
            assert torch.equal(new[98:rows], old[98:])
            assert not new[max(98, rows) :].any()
        else:
            assert torch.equal(new, old)


def test_an_existing_token_may_be_the_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model reserves tokens that it was never trained on: one of them becomes the mask."""
    theirs = save(tmp_path / "theirs", "Llama")
    outcome, settings = bring_in(
        tmp_path / "theirs",
        tmp_path / "ours",
        capsys,
        "--mask-token",
        RESERVED[1],
        "--pad-token",
        RESERVED[0],
    )
    assert "the mask token is <reserved_1>, id 95; added tokens: none" in outcome.output
    facts = json.loads((tmp_path / "ours/config.json").read_text())
    assert (facts["mask_token_id"], facts["pad_token_id"], facts["num_tokens"]) == (95, 94, 96)
    old, new = theirs.model.embed_tokens.weight, open_weights(tmp_path / "ours")["model.embed_tokens.weight"]
    torch.testing.assert_close(new.read()[95], old[:95].mean(0))
    assert torch.equal(new.read()[:95], old[:95])
    assert settings["train"]["initial_weights"] == str(tmp_path / "ours")


@pytest.fixture
def imported(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return a folder with an imported Qwen3 (ours/) and pairs in its tokens (pairs.bin and .idx)."""
    save(tmp_path / "theirs", "Qwen3", head_dim=12)
    bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    arguments = [
        "--input",
        str(data / "corpus.jsonl"),
        *KEYS,
        "--tokenizer",
        str(tmp_path / "ours/tokenizer"),
    ]
    preprocess_data.main([*arguments, "--output-prefix", str(tmp_path / "pairs"), "--workers", "1"])
    return tmp_path


def settings(imported: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the settings of a run from the imported model whose one step changes nothing."""
    still = (
        "--train.steps 1 --optimizer.learning_rate 1e-30 --schedule.warmup_steps 0 --evaluation.interval 0"
    )
    model = ["--config", str(imported / "ours/model.yaml")]
    return command(imported, run_dir, *model, *still.split(), "--optimizer.ema_decay", "0.5", *more)


def assert_equal(run_dir: Path, folder: Path) -> None:
    """Weights and average of the run's checkpoint are those of a folder, bit for bit."""
    expected = {name: weight.read() for name, weight in open_weights(folder).items()}
    for averaged in (False, True):
        found = read_weights(run_dir / "checkpoints/step_00000001/model", averaged)
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert torch.equal(weight, expected[name]), name


@pytest.mark.distributed
def test_runs_start_from_imported_and_exported_weights(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import, ZeRO-3 on two ranks, export, plain engine: the same bits all the way."""
    result = run_forked("-m", "pipeline.train", *settings(imported, tmp_path / "one"), ranks=2)
    assert result.returncode == 0, result.stderr
    assert f"starting from the weights in {imported / 'ours'}" in result.stdout
    assert_equal(tmp_path / "one", imported / "ours")
    exported = str(tmp_path / "exported")
    arguments = ["--checkpoint", str(tmp_path / "one"), "--output", exported, "--max-shard-size", "20KB"]
    assert run_here(export_hf.main, arguments, capsys).code == 0
    again = settings(
        imported, tmp_path / "two", "--train.initial_weights", exported, "--engine.kind", "plain"
    )
    outcome = run_here(train.main, again, capsys)
    assert outcome.code == 0, outcome.error
    assert_equal(tmp_path / "two", tmp_path / "exported")
    assert_equal(tmp_path / "two", imported / "ours")
    # A resumed run has its own weights and no longer needs the folder.
    shutil.rmtree(exported)
    outcome = run_here(train.main, [*again, "--train.steps", "2"], capsys)
    assert outcome.code == 0, outcome.error
    assert "starting from" not in outcome.output


def test_what_a_run_cannot_start_from(
    imported: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*more: str) -> str:
        arguments = settings(imported, tmp_path / "run", "--engine.kind", "plain", *more)
        return run_here(train.main, arguments, capsys).complaint()

    assert "config.json is missing" in complaint("--train.initial_weights", str(tmp_path / "nowhere"))
    assert "A run must be exported first" in complaint("--train.initial_weights", str(tmp_path / "run"))
    assert "tools/import_hf.py" in complaint("--train.initial_weights", str(tmp_path / "theirs"))
    found = complaint("--model.rope_theta", "1e4")
    assert "model.rope_theta = 5000.0, the run has 10000.0: set it to 5000.0" in found
    assert "model.prediction = shifted, the run has same" in complaint("--model.prediction", "same")
    assert "model.vocab_size = 104, the run has 112" in complaint("--model.vocab_size", "112")
    other = tmp_path / "other"
    run_here(
        preprocess_data.main,
        ["--input", str(data / "corpus.jsonl"), *KEYS, "--tokenizer", str(data / "tokenizer"),
         "--output-prefix", str(other), "--workers", "1"],
        capsys,
    )  # fmt: skip
    found = complaint("--data.tokenizer", str(data / "tokenizer"), "--data.prefixes", f"[{other}]")
    assert "another tokenizer" in found
    assert str(imported / "ours/tokenizer") in found
    path = imported / "ours/model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.self_attn.q_norm.weight"
    save_file({key: weight for key, weight in weights.items() if key != name}, path)
    found = complaint()
    assert f"{path} has changed since it was written ({imported / 'ours/SHA256SUMS'})" in found
    assert "is missing" in complaint("--checkpoint.verify_hashes", "false")
    (imported / "ours/SHA256SUMS").unlink()
    assert f"{name} to start from is missing, the model has [12]" in complaint()
    save_file(weights | {name: torch.ones(3)}, path)
    assert f"{name} to start from is of shape [3]" in complaint()
    path.write_bytes(path.read_bytes()[:1000])
    assert "model.safetensors is missing or damaged" in complaint()
    path.unlink()
    assert "convert older files" in complaint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "qwen2, qwen3, llama"]),
        ({"model_type": "masked_diffusion"}, ["exported", "train.initial_weights"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'"]),
        ({"attention_bias": True}, ["attention_bias = True"]),
        ({"mlp_bias": True}, ["mlp_bias = True"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rotary", "yarn"]),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 8.0}}, ["rotary", "8.0"]),
        ({"partial_rotary_factor": 0.5}, ["rotary", "0.5"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers is missing"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_models_that_are_built_in_another_way(
    change: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 101,
    } | change  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "ours")]
    complaint = run_here(import_hf.main, arguments, capsys).complaint()
    assert str(tmp_path) in complaint
    assert all(word in complaint for word in words), complaint


def test_folders_that_are_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing tokenizer or file is named, and nothing is left behind."""
    arguments = ["--input", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]
    assert "theirs has no config.json" in run_here(import_hf.main, arguments, capsys).complaint()
    save(tmp_path / "theirs", "Llama")
    (tmp_path / "theirs/tokenizer.json").rename(tmp_path / "t.json")
    assert "AutoTokenizer" in run_here(import_hf.main, arguments, capsys).complaint()
    (tmp_path / "t.json").rename(tmp_path / "theirs/tokenizer.json")
    complaint = run_here(import_hf.main, [*arguments, "--eos-token", "stop"], capsys).complaint()
    assert "--eos-token" in complaint
    file = sorted((tmp_path / "theirs").glob("*.safetensors"))[1]
    file.unlink()
    assert file.name in run_here(import_hf.main, arguments, capsys).complaint()
    shutil.rmtree(tmp_path / "theirs")
    save(tmp_path / "theirs", "Llama")
    (tmp_path / "theirs/model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.ones(31)}, tmp_path / "theirs/model.safetensors")
    complaint = run_here(import_hf.main, arguments, capsys).complaint()
    assert "model.embed_tokens.weight is missing, by config.json it is (101, 32)" in complaint
    (tmp_path / "theirs/config.json").write_text("{")
    assert "config.json is damaged" in run_here(import_hf.main, arguments, capsys).complaint()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    (tmp_path / "ours").mkdir()
    assert "exists" in run_here(import_hf.main, arguments, capsys).complaint()


def test_settings_of_transformers_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Older files have rope_theta and rope_scaling, buffers, and leave out what is the family's default."""
    save(tmp_path / "theirs", "Llama", rope_parameters=LLAMA3)
    path = tmp_path / "theirs/config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    for key in ("head_dim", "tie_word_embeddings"):
        del config[key]
    path.write_text(json.dumps(config | {"rope_scaling": scaling}))
    index = tmp_path / "theirs/model.safetensors.index.json"
    places = json.loads(index.read_text())
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    places["weight_map"][extra] = "extra.safetensors"
    index.write_text(json.dumps(places))
    save_file({extra: torch.ones(4)}, tmp_path / "theirs/extra.safetensors")
    _, settings = bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    names = open_weights(tmp_path / "ours").keys()
    assert "lm_head.weight" in names
    assert not any("inv_freq" in name for name in names)
    model = settings["model"]
    assert (model["rope_theta"], model["rope_factor"], model["rope_original_length"]) == (5000.0, 8.0, 64)
    assert not model["tie_embeddings"]
    assert "head_size" not in model


def test_hashes_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sha256sum agrees; a changed, missing or foreign name is found; no hashes are needed."""
    save(tmp_path / "theirs", "Llama")
    bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    folder = tmp_path / "ours"
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    written = (folder / "SHA256SUMS").read_text()
    listed = {line.split("  ")[1] for line in written.splitlines()}
    assert listed == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    check_sums(folder)
    for name in ("config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} has changed since it was written"):
            check_sums(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            check_sums(folder)
        (folder / name).write_bytes(content)
    for line in ("no hash", f"{'0' * 64}  ../other.safetensors", f"{'0' * 64}  /etc/config.json"):
        (folder / "SHA256SUMS").write_text(written + line + "\n")
        with pytest.raises(UserError, match=r"SHA256SUMS, line \d+ is damaged"):
            check_sums(folder)
    (folder / "SHA256SUMS").unlink()
    check_sums(folder)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/../../x", "sub/x.safetensors", "..", "", None, 3]
)
def test_an_index_names_files_of_its_folder_only(
    place: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both at an import and for the weights that a run starts from."""
    save(tmp_path / "theirs", "Llama")
    index = tmp_path / "theirs/model.safetensors.index.json"
    values = json.loads(index.read_text())
    for name in ("secret", "theirs/secret"):
        save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / f"{name}.safetensors")
    values["weight_map"]["model.norm.weight"] = place
    index.write_text(json.dumps(values))
    arguments = ["--input", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]
    line = run_here(import_hf.main, arguments, capsys).complaint()
    assert f"{index}: the weight model.norm.weight is in {place!r}" in line
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("values", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_weights(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "theirs", "Llama")
    index = tmp_path / "theirs/model.safetensors.index.json"
    index.write_text(json.dumps(values))
    arguments = ["--input", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]
    assert f"{index} lists no weights" in run_here(import_hf.main, arguments, capsys).complaint()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32', not a number"),
        ({"num_hidden_layers": [2]}, "num_hidden_layers is [2], not a number"),
        ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "has no number as its factor"),
        ({"rope_parameters": LLAMA3 | {"factor": "8"}}, "has no number as its factor"),
    ],
)
def test_values_that_are_no_numbers(
    more: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "theirs", "Llama")
    path = tmp_path / "theirs/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    arguments = ["--input", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]
    line = run_here(import_hf.main, arguments, capsys).complaint()
    assert str(path) in line
    assert message in line


def test_a_model_without_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LlamaModel saves the same weights without the prefix; tied embeddings make it whole."""
    theirs = save(tmp_path / "theirs", "Llama", tie_word_embeddings=True)
    bring_in(tmp_path / "theirs", tmp_path / "ours", capsys)
    for path in (tmp_path / "theirs").glob("*.safetensors*"):
        path.unlink()
    theirs.model.save_pretrained(tmp_path / "theirs")
    bring_in(tmp_path / "theirs", tmp_path / "bare", capsys)
    expected = {name: weight.read() for name, weight in open_weights(tmp_path / "ours").items()}
    found = {name: weight.read() for name, weight in open_weights(tmp_path / "bare").items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
