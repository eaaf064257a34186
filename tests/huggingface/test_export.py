"""Exported folders, loaded by transformers in a fresh process, against our own model."""

from __future__ import annotations

import ast
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from pipeline import objectives
from pipeline.checkpoint.load_model import load_model
from pipeline.config import Config, ModelConfig, ObjectiveConfig
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Examples
from pipeline.decoding.completing import complete
from pipeline.engine.weights import StoredWeight
from pipeline.huggingface.folders import divide, write_weights
from pipeline.huggingface.mapping import Exported, to_json
from pipeline.huggingface.remote_code import modeling_masked_diffusion
from pipeline.huggingface.remote_code.configuration_masked_diffusion import MaskedDiffusionConfig
from pipeline.huggingface.remote_code.modeling_masked_diffusion import MaskedDiffusionForMaskedLM
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from support.forked import LIBRARIES, run_forked
from support.programs import ROOT, Outcome, run_here
from support.runs import train_on
from support.weights import read_weights
from tools import export_hf

pytestmark = pytest.mark.slow
LOAD = str(ROOT / "tests/support/load_export.py")
TEXT = "ab<mask>dc<mask><mask>fg"


@pytest.fixture(scope="module")
def sharded_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of ZeRO-3 on two ranks, with an average."""
    run_dir = tmp_path_factory.mktemp("zero3") / "run"
    train_on(2, data, run_dir, "--train.steps", "4", "--optimizer.ema_decay", "0.5")
    return run_dir


def export(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path, *more: str) -> Outcome:
    return run_here(export_hf.main, ["--checkpoint", str(checkpoint), "--output", str(output), *more], capsys)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of an exported folder, and check its index against the files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
            if path.name != "model.safetensors":
                places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
                assert {places[name] for name in file.keys()} == {path.name}  # noqa: SIM118
    return found


def test_weights_are_copied_bit_for_bit(
    sharded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The average in several fp32 files, the raw weights in one of bf16."""
    average, raw = tmp_path / "average", tmp_path / "raw"
    assert export(capsys, sharded_run, average, "--max-shard-size", "20KB").code == 0
    assert export(capsys, sharded_run, raw, "--weights", "raw", "--dtype", "bfloat16").code == 0
    assert len(list(average.glob("model-*-of-*.safetensors"))) == 5
    assert [path.name for path in raw.glob("*.safetensors")] == ["model.safetensors"]
    for folder, averaged, dtype in ((average, True, torch.float32), (raw, False, torch.bfloat16)):
        expected = read_weights(sharded_run / "checkpoints/step_00000004/model", averaged)
        expected.pop("lm_head.weight", None)  # tied
        exported = weights_in(folder)
        assert exported.keys() == expected.keys()
        for name, weight in exported.items():
            assert weight.dtype == dtype
            assert torch.equal(weight, expected[name].to(dtype)), name
    readable = (sharded_run / "config.yaml").stat().st_mode & 0o777
    assert {path.stat().st_mode & 0o777 for path in average.glob("*.*")} == {readable}


def test_transformers_gives_our_logits(
    sharded_run: Path, train: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh process without our package and without network: ids, hidden states, logits and loss."""
    other = tmp_path / "other"  # of the plain engine
    shape = """--model.tie_embeddings false --model.kv_heads 2 --model.attention_bias true
        --model.rope_theta 5 --model.head_size 12 --model.qk_norm true --model.rope_factor 2
        --model.rope_original_length 16"""
    assert train(other, "--train.steps", "4", *shape.split()).code == 0
    cases = [
        (sharded_run, "ema", "float32", 1e-5),
        (sharded_run, "raw", "bfloat16", 1e-2),
        (other, "raw", "float32", 1e-5),
    ]
    folders = [tmp_path / f"out{number}" for number in range(len(cases))]
    for (run_dir, kind, dtype, _), folder in zip(cases, folders, strict=True):
        assert export(capsys, run_dir, folder, "--weights", kind, "--dtype", dtype).code == 0
    result = run_forked(LOAD, str(tmp_path / "theirs.pt"), TEXT, *map(str, folders), by=LIBRARIES)
    assert result.returncode == 0, result.stderr

    all_theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    for theirs, (run_dir, kind, dtype, tolerance) in zip(all_theirs, cases, strict=True):
        loaded = load_model(run_dir, torch.device("cpu"), weights=kind)
        model = loaded.model.to(getattr(torch, dtype))
        ids = theirs["ids"]
        text = [token for part in TEXT.split("<mask>") for token in [*loaded.tokenizer.encode(part), 3]][:-1]
        assert ids.tolist() == [text]
        flat = torch.arange(ids.numel())
        present = torch.ones_like(ids, dtype=torch.bool)
        present[:, -2:] = False
        logits = model.logits(ids, flat)
        ours = {
            "hidden": model.model(ids)[0].detach(),
            "logits": logits,
            "padded_logits": model.logits(ids, flat, present),
            "loss": -logits.log_softmax(-1)[flat, ids[0]][ids[0] != 3].mean(),
        }
        for position, guesses in zip(
            (ids[0] == 3).nonzero()[:, 0].tolist(), theirs["fill-mask"], strict=True
        ):
            best = logits[position].softmax(-1).topk(2)
            assert [one["token"] for one in guesses] == best.indices.tolist()
            assert [one["score"] for one in guesses] == pytest.approx(best.values.tolist(), abs=tolerance)
        for name, value in ours.items():
            found = theirs[name][0] if theirs[name].ndim else theirs[name]
            torch.testing.assert_close(found, value, atol=tolerance, rtol=tolerance)
        assert (logits[:, [3, *range(12, 16)]] == -torch.inf).all(), "mask and padding rows"
        assert logits[:, 4:12].std() > 0.01, "logits near 0 would compare nothing"


def test_a_bf16_product_in_fp32_has_a_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where torch has none: on the meta device its types, on a CPU its values."""
    hidden = torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(5, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    logits = modeling_masked_diffusion.fp32_product(hidden, weight)
    assert (logits.shape, logits.dtype) == ((2, 3, 5), torch.float32)
    logits.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.shape, weight.grad.dtype) == ((2, 3, 4), torch.bfloat16)

    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out_dtype=None: mm(a.float(), b.float()).to(out_dtype or a.dtype)
    )
    a, b = (torch.randn(n, 4).bfloat16().requires_grad_() for n in (3, 5))
    c, d = (x.detach().float().requires_grad_() for x in (a, b))
    factor = torch.randint(-3, 4, (3, 5)).float()
    (modeling_masked_diffusion.Fp32Product.apply(a, b) * factor).sum().backward()
    (c @ d.T * factor).sum().backward()
    for ours, exact in ((a, c), (b, d)):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.float(), exact.grad, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("prediction", ["same", "shifted"])
@pytest.mark.parametrize(
    ("objective", "attention"),
    [
        ({}, {"attention": "bidirectional"}),
        ({"kind": "autoregressive"}, {"attention": "causal"}),
        ({"block_size": 3}, {"attention": "blocks", "block_size": 3}),
        (
            {"kind": "random_masking", "block_size": 3, "switch_to": "autoregressive", "switch_step": 5},
            {"attention": "causal"},
        ),
    ],
    ids=["whole", "causal", "blocks", "switched"],
)
def test_every_way_of_attention(
    objective: dict[str, Any], attention: dict[str, Any], prediction: str
) -> None:
    """The code that goes along, with the weights of our model, as the sampler calls both."""
    model = ModelConfig(layers=2, hidden_size=32, kv_heads=2, intermediate_size=48, prediction=prediction)
    config = Config(run_dir="", model=model, objective=ObjectiveConfig(**objective))
    vocabulary = Vocabulary(24, 22, 3)
    tokenizer = SimpleNamespace(mask=3, pad=1, eos=2)
    torch.manual_seed(0)
    ours = MaskedDiffusionModel(model, vocabulary).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    pattern = objectives.decoding_layout(config, 3, 9).attention
    exported = Exported(model, vocabulary, tokenizer, 16, "float32", pattern, attention.get("block_size"))
    settings = to_json(exported)
    assert settings.items() >= attention.items()
    theirs = MaskedDiffusionForMaskedLM(MaskedDiffusionConfig(**settings)).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(4, 22, (2, 16))
    tokens[:, 7::2] = 3
    roles = torch.tensor([[PROMPT] * 4 + [ANSWER] * 10 + [PADDING] * 2, [PROMPT] + [ANSWER] * 15])
    layout = objectives.build(config, 3, has_padding=True).at(9).layout
    visibility = layout.decoding(Examples(tokens, roles, torch.arange(2)))
    present = roles != PADDING
    given = {} if attention["attention"] != "blocks" else {"blocks": visibility.blocks}
    with torch.no_grad():
        expected = ours.logits(tokens, torch.arange(32), present, visibility).view(2, 16, 24)
        found = theirs(tokens, attention_mask=present.long(), **given).logits
    torch.testing.assert_close(found[present], expected[present], atol=1e-5, rtol=1e-5)
    if given:
        with pytest.raises(ValueError, match="blocks of 3 tokens: give `blocks`"):
            theirs(tokens)


def test_gradient_checkpointing_and_embeddings_as_inputs() -> None:
    """The same loss and the same gradients, bit for bit, as by ids and with all activations kept."""
    torch.manual_seed(0)
    config = MaskedDiffusionConfig(vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = MaskedDiffusionForMaskedLM(config).train()
    ids = torch.randint(4, 24, (2, 8))
    labels = ids.masked_fill(torch.arange(8) % 2 == 0, -100)
    embeddings = model.get_input_embeddings()(ids)

    def gradients(**inputs: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        body = [parameter for name, parameter in model.named_parameters() if "embed" not in name]
        return [loss.detach(), *(parameter.grad for parameter in body if parameter.grad is not None)]

    expected = gradients(input_ids=ids)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.model.layers[0].register_forward_pre_hook(count)
    by_embeddings = gradients(inputs_embeds=embeddings.detach())
    assert runs == 1
    model.gradient_checkpointing_enable()
    recomputed = gradients(input_ids=ids)
    assert runs == 3, "once forward, and once again in the backward pass"
    for found in (by_embeddings, recomputed):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeddings)


def test_model_card(sharded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The card has the facts of the training, and a header that the Hub reads."""
    checkpoint = sharded_run / "checkpoints/step_00000004"
    assert "step 4" in export(capsys, checkpoint, tmp_path / "name-of-it").output
    header, text = (tmp_path / "name-of-it/README.md").read_text().split("---\n")[1:]
    assert yaml.safe_load(header)["library_name"] == "transformers"
    parameters = sum(weight.numel() for weight in weights_in(tmp_path / "name-of-it").values())
    for fact in (
        "# name-of-it", "moving average", "float32", f"| parameters | {parameters:,} |",
        "| datasets | pairs |", "| sequences seen | 64 of 12 tokens |", "| tokens seen | 768 |",
        "| held-out loss | ", "kind puma", "stages 4", "learning_rate 0.0003",
        "| ranks | 2 |", "deepspeed 0.19.8",
    ):  # fmt: skip
        assert fact in text
    assert str(tmp_path) not in text
    assert str(sharded_run) not in text


@pytest.mark.parametrize(
    "settings",
    ["", "--objective.block_size 4", "--objective.kind autoregressive --model.prediction shifted"],
    ids=["whole", "blocks", "causal"],
)
def test_the_script_of_the_card_runs(
    settings: str, train: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, in a fresh process beside the folder, where our package cannot be imported."""
    assert train(tmp_path / "run", "--train.steps", "2", *settings.split()).code == 0
    assert export(capsys, tmp_path / "run", tmp_path / "mine").code == 0
    script = (tmp_path / "mine/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(script.strip().splitlines()) <= 10
    prompts = ["abc", "fedc"]
    for text, prompt in zip(("any text", "another text"), prompts, strict=True):
        script = script.replace(text, prompt)  # the tokenizer knows these characters only
    (tmp_path / "script.py").write_text(script)
    without_us = "import runpy, sys; sys.modules['pipeline'] = None; runpy.run_path('script.py')"
    outcome = run_forked("-c", without_us, folder=tmp_path, by=LIBRARIES)
    assert outcome.returncode == 0, outcome.stderr
    loaded = load_model(tmp_path / "run", torch.device("cpu"))
    expected = [
        prompt
        + loaded.tokenizer.decode([i for i in one.tokens if i not in loaded.tokenizer.special_ids.values()])
        for prompt, one in zip(prompts, complete(loaded, prompts, length=6), strict=True)
    ]
    assert ast.literal_eval(outcome.stdout.strip()) == expected


def test_what_cannot_be_exported(
    train: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "out"
    assert "no checkpoint" in export(capsys, run_dir, output).complaint()
    assert train(run_dir, "--train.steps", "4").code == 0
    assert "optimizer.ema_decay" in export(capsys, run_dir, output, "--weights", "ema").complaint()
    for size in ("5", "0GB", "1.5GB", "many"):
        assert "such as 5GB" in export(capsys, run_dir, output, "--max-shard-size", size).complaint()
    assert list(tmp_path.iterdir()) == [run_dir], "nothing is left behind"
    output.mkdir()
    assert str(output) in export(capsys, run_dir, output).complaint()


def test_one_shard_and_one_weight_in_memory(tmp_path: Path) -> None:
    """Counted over all tensors that are alive, while 64 weights of 1 kB are written in shards of 4 kB."""
    alive: dict[int, int] = {}
    peak = 0

    def read() -> torch.Tensor:
        nonlocal peak
        array = np.zeros(256, np.float32)
        alive[id(array)] = array.nbytes
        weakref.finalize(array, alive.pop, id(array))
        peak = max(peak, sum(alive.values()))
        return torch.from_numpy(array)

    weights = {f"w{i}": StoredWeight((256,), torch.float32, read) for i in range(64)}
    write_weights(weights, tmp_path, 4096, torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) == 16
    assert peak <= 4096 + 1024


@pytest.mark.parametrize("limit", [1, 10, 25, 1000])
def test_shards_keep_the_order_and_the_limit(limit: int) -> None:
    sizes = {f"w{i}": size for i, size in enumerate([3, 9, 12, 1, 1, 30, 7, 7, 7, 4])}
    shards = divide(sizes, limit)
    assert [name for names in shards for name in names] == list(sizes)
    for names, following in zip(shards, [*shards[1:], None], strict=True):
        total = sum(sizes[name] for name in names)
        assert total <= limit or len(names) == 1
        assert following is None or total + sizes[following[0]] > limit, "no shard is smaller than it need be"
