"""tools/generate.py and tools/evaluate.py on exports, also on those that transformers has saved again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.base.errors import UserError
from pipeline.decoding.completing import complete
from pipeline.decoding.sampling import SamplingSettings
from pipeline.huggingface.loading import load_any
from pipeline.huggingface.remote_code.modeling_masked_diffusion import MaskedDiffusionForMaskedLM
from pipeline.huggingface.remote_code.tokenization_masked_diffusion import MaskedDiffusionTokenizer
from support.exports import export_random
from support.programs import Outcome, run_here
from tools import evaluate, export_hf, generate

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def save_again(folder: Path, output: Path, tokenizer: str = "char") -> Path:
    """Save an export by transformers, and return its folder."""
    MaskedDiffusionForMaskedLM.from_pretrained(folder).save_pretrained(output)
    reader = PreTrainedTokenizerFast if tokenizer == "huggingface" else MaskedDiffusionTokenizer
    reader.from_pretrained(folder).save_pretrained(output)
    return output


@pytest.mark.parametrize(
    ("tokenizer", "objective", "data_kind"),
    [
        ("char", {}, "pairs"),
        ("huggingface", {"block_size": 3}, "packed"),
        ("char", {"kind": "autoregressive"}, "packed"),
    ],
)
def test_an_export_decodes_as_its_model(
    tokenizer: str, objective: dict[str, str], data_kind: str, tmp_path: Path
) -> None:
    loaded = export_random(tmp_path / "mine", objective, data_kind, tokenizer, prediction="shifted")
    again = save_again(tmp_path / "mine", tmp_path / "again", tokenizer)
    assert not (again / "tokenizer").exists()
    settings = SamplingSettings(temperature=1.0)
    expected = complete(loaded, ["ab", "fgcd?"], settings, 8)
    for folder in (tmp_path / "mine", again):
        found = load_any(folder, CPU)
        assert complete(found, ["ab", "fgcd?"], settings, 8) == expected
        assert found.tokenizer.special_ids == loaded.tokenizer.special_ids
        assert found.layout.attention == loaded.layout.attention


def test_the_programs_on_a_run_and_on_its_exports(
    data: Path, train: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same samples, the same figures, the same likelihoods; a results file knows whose it is."""
    run_dir, mine = tmp_path / "run", tmp_path / "mine"
    settings = ("--train.steps", "4", "--model.init_std", "0.5", "--optimizer.ema_decay", "0.5")
    assert train(run_dir, *settings).code == 0
    exported = ["--checkpoint", str(run_dir), "--output", str(mine)]
    assert run_here(export_hf.main, exported, capsys).code == 0
    again = save_again(mine, tmp_path / "again")

    def outputs(folder: Path) -> list[str]:
        place = ["--checkpoint", str(folder)]
        samples = ["--prompt", "abc", "f[MASK*3]", "--temperature", "1", "--json"]
        figures = ["--data", str(data / "corpus.jsonl"), "--task", "exact", "--length", "7"]
        likelihood = ["--data", str(data / "corpus.jsonl"), "--task", "likelihood", "--draws", "4"]
        found = [run_here(generate.main, [*place, *samples], capsys)]
        found += [run_here(evaluate.main, [*place, *more], capsys) for more in (figures, likelihood)]
        assert [one.code for one in found] == [0, 0, 0], found
        return [one.output for one in found]

    expected = outputs(run_dir)
    assert outputs(mine) == expected
    assert outputs(again) == expected

    result = ["--data", str(data / "corpus.jsonl"), "--task", "exact", "--output", str(tmp_path / "a.json")]
    assert run_here(evaluate.main, ["--checkpoint", str(mine), *result], capsys).code == 0
    assert "sha256 of the export" in json.loads((tmp_path / "a.json").read_text())["settings"]
    moved = mine.rename(tmp_path / "moved")
    line = run_here(evaluate.main, ["--checkpoint", str(moved), *result], capsys).complaint()
    assert "--restart" in line


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    export_random(folder)

    def complaint(*more: str) -> str:
        return run_here(
            generate.main, ["--checkpoint", str(folder), "--prompt", "a", *more], capsys
        ).complaint()

    assert "--weights raw has no effect" in complaint("--weights", "raw")
    with pytest.raises(UserError, match="--untrained has no effect"):
        load_any(folder, CPU, untrained=True)
    settings = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "llama"}, "model_type 'llama': convert it with tools/import_hf.py first"),
        ({"attention": None}, "attention is None: this model was imported, and is to be trained first"),
        ({"num_hidden_layers": 3}, "the weights do not fit config.json"),
    ):
        (folder / "config.json").write_text(json.dumps(settings | change))
        assert message in complaint()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    assert "has changed since it was written" in complaint()
    assert (
        run_here(generate.main, ["--checkpoint", str(folder), "--prompt", "a", "--no-verify"], capsys).code
        == 0
    )
    (folder / "tokenizer").rename(folder / "other")
    (folder / "tokenizer.model").unlink()
    assert "has neither tokenizer/ nor tokenizer.model nor tokenizer.json" in complaint("--no-verify")
