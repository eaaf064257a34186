"""Whole runs on packed text whose documents are kept apart, some of them cut to random lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import train as program
from pipeline.base.errors import UserError
from support.corpora import TEXT, make_dataset
from support.programs import Outcome, run_here
from support.runs import command, metrics
from tools import plan_run

pytestmark = pytest.mark.slow
APART = ["--data.isolate_documents", "true", "--data.random_length_share", "0.3"]


@pytest.fixture
def packed(data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that returns the settings of a run on 200 texts of 1 to 9 letters."""
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdef"), random.integers(1, 10))) for _ in range(200)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    make_dataset([tmp_path / "x.jsonl"], data / "tokenizer", tmp_path / "text", TEXT, append_eos=True)
    more = ["--data.kind", "packed", "--data.prefixes", f"[{tmp_path / 'text'}]", "--engine.kind", "plain"]
    return lambda run, *settings: command(data, tmp_path / run, *more, "--train.steps", "8", *settings)


@pytest.mark.parametrize("objective", [
    [], ["--objective.block_size", "4", "--model.prediction", "shifted"],
    ["--objective.kind", "autoregressive", "--model.prediction", "shifted"],
], ids=["whole", "blocks-shifted", "autoregressive"])  # fmt: skip
def test_a_run_keeps_documents_apart(packed: Callable[..., list[str]], objective: list[str]) -> None:
    """It trains, measures and writes texts; other losses show that documents are apart."""
    losses = []
    for name, settings in (("together", []), ("apart", APART[:2]), ("short", APART)):
        arguments = packed(name, *objective, *settings)
        assert program.main(arguments) == 0
        lines = metrics(Path(arguments[1]))
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert len(losses[-1]) == 8
        assert all(math.isfinite(loss) for loss in losses[-1])
        assert any("held_out/loss" in line for line in lines)
    assert losses[0][0] != losses[1][0] != losses[2][0]


def test_a_resumed_run_cannot_change_them(packed: Callable[..., list[str]]) -> None:
    assert program.main(packed("run", *APART[:2])) == 0
    with pytest.raises(UserError, match=r"data.isolate_documents = True, the run has False: set it back"):
        program.main(packed("run"))
    with pytest.raises(UserError, match=r"data.random_length_share = 0.0, the run has 0.3: set it back"):
        program.main(packed("run", *APART))


def test_a_plan_counts_the_pairs_of_the_documents(
    packed: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer attention FLOPs than whole rows have; the source of the figure is named."""
    counts = []
    for settings in ([], APART[:2]):
        config = tmp_path / "config.yaml"
        config.write_text("run_dir: unused\n")
        given = [word for word in packed("unused", *settings, "--model.vocab_size", "16")]
        pairs = [f"{key[2:]}={value}" for key, value in zip(given[::2], given[1::2], strict=True)]
        arguments = ["--config", str(config), "--set", *pairs, "--json", "--gpus", "1"]
        outcome: Outcome = run_here(plan_run.main, arguments, capsys)
        assert outcome.code == 0, outcome.error
        plan = json.loads(outcome.output)
        counts.append(plan["plan"]["flops"]["attention"])
    assert plan["basis"]["pairs in one document"]["source"] == "index of data.prefixes"
    assert counts[1] / counts[0] == pytest.approx(plan["basis"]["pairs in one document"]["value"] / 12**2)
    assert counts[1] < 0.6 * counts[0]
