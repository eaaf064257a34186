"""A run on chats carries their template: to its checkpoints, programs and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.checkpoint.manifest import find
from pipeline.data.facts import read_facts
from pipeline.data.indexed import read_index, read_sequence
from pipeline.data.tokenizer import Tokenizer
from pipeline.evaluation.harness_model import PumaLM
from support.programs import Outcome, run_here
from tools import evaluate, export_hf, generate, merge_datasets, preprocess_data

pytestmark = pytest.mark.slow

ROWS = [("ab", "cd"), ("fe", "g"), ("c", "dd")]


@pytest.fixture
def template(data: Path, tmp_path: Path) -> str:
    """Return a template, and write a dataset of chats by it: TMP/chats."""
    tokenizer = Tokenizer.load(data / "tokenizer")
    end = tokenizer.model.token(tokenizer.eos)
    text = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    (tmp_path / "c.jinja").write_text(text)
    rows = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in ROWS * 10
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    preprocess_data.main(
        ["--input", str(tmp_path / "chats.jsonl"), "--messages-key", "messages", "--workers", "1",
         "--chat-template", str(tmp_path / "c.jinja"), "--tokenizer", str(data / "tokenizer"),
         "--output-prefix", str(tmp_path / "chats")]
    )  # fmt: skip
    return text


def test_exports_and_programs_know_the_template(
    train: Callable[..., Outcome],
    template: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The pairs beside the chats, merged or not, have no template and change nothing."""
    merged = ["--datasets", str(tmp_path / "chats"), str(data / "pairs")]
    merged += ["--mixed-eos", "--output-prefix", str(tmp_path / "all")]
    assert run_here(merge_datasets.main, merged, capsys).code == 0
    assert read_facts(tmp_path / "all").chat_templates == {template}
    run = tmp_path / "run"
    both = ["--data.prefixes", f"[{tmp_path / 'all'},{data / 'pairs'}]", "--train.steps", "2"]
    assert train(run, *both, "--evaluation.interval", "0").code == 0
    assert (find(run)[0] / "tokenizer/chat_template.jinja").read_text() == template
    exported = ["--checkpoint", str(run), "--output", str(tmp_path / "exported")]
    assert run_here(export_hf.main, exported, capsys).code == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    index = read_index(tmp_path / "chats")
    for number, (asked, _) in enumerate(ROWS):
        chat = [{"role": "user", "content": asked}]
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == read_sequence(tmp_path / "chats", index, 2 * number).tolist(), (
            "the prompt of the training"
        )
    given = ["--chat-template", str(tmp_path / "c.jinja")]
    for place in (str(run), str(tmp_path / "exported")):
        asking = ["--checkpoint", place, "--prompt", "ab", "--length", "4", "--json"]
        texts = [run_here(generate.main, [*asking, *more], capsys).output for more in (["--chat"], given, [])]
        assert texts[0] == texts[1]
        scoring = ["--checkpoint", place, "--task", "exact", "--data", str(data / "corpus.jsonl")]
        scoring += ["--length", "2", "--restart", "--output", str(tmp_path / "r.json")]
        items = []
        for more in (["--chat"], given, []):
            assert run_here(evaluate.main, [*scoring, *more], capsys).code == 0
            items.append(json.loads((tmp_path / "r.json").read_text())["items"])
        assert items[0] == items[1] != items[2]
    assert PumaLM(str(run)).chat_template(True) == template


def test_a_run_without_chats_says_so(
    train: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--train.steps", "2", "--evaluation.interval", "0").code == 0
    asking = ["--checkpoint", str(tmp_path), "--prompt", "ab", "--chat"]
    complaint = run_here(generate.main, asking, capsys).complaint()
    assert complaint == "error: --chat: this model carries no chat template: name one by --chat-template."
