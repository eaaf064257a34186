"""tools/evaluate.py: figures, result files, resume, several ranks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoint.load_model import load_model
from pipeline.data.datasets import build_datasets
from pipeline.data.examples import stack_examples
from pipeline.data.facts import check_data
from pipeline.evaluation import measures
from pipeline.evaluation.intervals import wilson_interval
from pipeline.evaluation.likelihood import estimate
from pipeline.evaluation.results import Results
from pipeline.ranks import Ranks
from support.forked import run_forked
from support.programs import ROOT, Outcome, run_here
from tools import evaluate

pytestmark = pytest.mark.slow

Evaluate = Callable[..., Outcome]


@pytest.fixture
def run(run_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Return a function that evaluates the run on the corpus it was trained on, in this process."""

    def evaluated(*more: str) -> Outcome:
        first = ["--checkpoint", str(run_dir), "--task", "exact", "--data", str(data / "corpus.jsonl")]
        settings = [] if "likelihood" in more else ["--length", "7", "--temperature", "1"]
        return run_here(evaluate.main, [*first, *settings, "--batch-size", "7", *more], capsys)

    return evaluated


def read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree


def test_results_belong_to_one_checkpoint(run: Evaluate, run_dir: Path, tmp_path: Path) -> None:
    """A run that is trained anew has the same folder and the same step, and other figures."""
    output, manifest = tmp_path / "results.json", run_dir / "checkpoints/step_00000008/manifest.json"
    before = manifest.read_text()
    assert run("--output", str(output)).code == 0
    assert run("--output", str(output), "--no-verify").code == 0, "how it is read is no setting"
    values = json.loads(before)
    del values["sha256"]
    manifest.write_text(json.dumps(values | {"tokens": 1}))
    try:
        line = run("--output", str(output)).complaint()
    finally:
        manifest.write_text(before)
    assert f"{output} was made with sha256 of the checkpoint's manifest = " in line
    assert "--restart" in line


def test_figures_are_those_of_the_answers(run: Evaluate, data: Path, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "results.json"
    outcome = run("--output", str(output))
    assert (outcome.code, outcome.error) == (0, "")
    tree = read(output)
    corpus = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    items = tree["items"]
    assert [(i["item"], i["prompt"], i["reference"]) for i in items] == [
        (n, row["prompt"], row["answer"]) for n, row in enumerate(corpus)
    ]
    right = sum(item["answer"] == item["reference"] for item in items)
    assert [item["right"] for item in items] == [item["answer"] == item["reference"] for item in items]
    low, high = wilson_interval(right, 60)
    forwards = sum(item["steps"] for item in items) / sum(len(item["tokens"]) for item in items)
    assert tree["figures"] == {
        "right": right,
        "total": 60,
        "accuracy": right / 60,
        "interval": [low, high],
        "not_answered": 0,
        "tokens_per_forward": pytest.approx(1 / forwards),
    }
    assert outcome.output.splitlines()[-2:] == [
        f"accuracy {right / 60:.4f}, 95% interval {low:.4f} to {high:.4f} (Wilson), "
        f"{1 / forwards:.2f} tokens per forward",
        f"right {right / 60:.4f} of 60 items",
    ]
    assert tree["settings"]["--checkpoint"] == str(run_dir / "checkpoints" / "step_00000008")
    assert tree["settings"]["--temperature"] == 1.0
    assert "torch" in tree["versions"]
    assert [path.name for path in output.parent.iterdir()] == ["results.json"]


def test_an_interrupted_evaluation_resumes(
    run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command keeps finished items; the results equal those of an uninterrupted evaluation."""
    whole, output = tmp_path / "whole.json", tmp_path / "results.json"
    assert run("--output", str(whole)).code == 0
    decoded: list[int] = []
    decode = measures.fill_sequences

    def counting(*arguments: Any, numbers: Sequence[int], **more: Any) -> Any:
        if len(decoded) == 21:
            raise KeyboardInterrupt
        decoded.extend(numbers)
        return decode(*arguments, numbers=numbers, **more)

    with monkeypatch.context() as patch:
        patch.setattr(measures, "fill_sequences", counting)
        assert run("--output", str(output)).code == 130
        part = tmp_path / "results.items.0.jsonl"
        assert not output.exists()
        part.write_bytes(part.read_bytes()[:-9])  # a partial line, as after a kill
        for changed, message in [
            (["--seed", "5"], f"{part} was made with --seed = 0, now it is 5: set it back"),
            (["--tokens-per-step", "2"], "--tokens-per-step = 1, now it is 2"),
            (["--limit", "9"], "--limit = None, now it is 9"),
        ]:
            assert message in run("--output", str(output), *changed).complaint()
        first, decoded[:] = decoded[:20], []
        assert run("--output", str(output), "--batch-size", "99").code == 0
    assert (first, decoded) == ([*range(20)], [*range(20, 60)])
    assert output.read_bytes() == whole.read_bytes()
    assert not part.exists()
    with monkeypatch.context() as patch:
        patch.setattr(measures, "fill_sequences", None)
        assert run("--output", str(output), "--batch-size", "2").code == 0  # all items are finished
        assert "now it is 1" in run("--output", str(output), "--seed", "1").complaint()
    assert run("--output", str(output), "--seed", "1", "--restart").code == 0
    assert read(output)["settings"]["--seed"] == 1


def test_prompts_without_room_are_wrong_and_counted(run: Evaluate, data: Path, tmp_path: Path) -> None:
    """They do not affect the answers of the other items, at any batch size."""
    lines = (data / "corpus.jsonl").read_text().splitlines(keepends=True)[:9]
    long = json.dumps({"prompt": "abcdef", "answer": "abc"}) + "\n"  # 6 + 7 tokens, of 12
    mixed, output = tmp_path / "mixed.jsonl", tmp_path / "r.json"
    mixed.write_text("".join([*lines[:4], long, *lines[4:], long]))
    without = [n for n in range(11) if n not in (4, 10)]
    assert run("--output", str(tmp_path / "plain.json"), "--temperature", "0").code == 0
    plain = read(tmp_path / "plain.json")["items"]
    expected = {n: plain[n - (n > 4)] for n in without}
    for size in ("1", "4", "20"):
        more = ["--data", str(mixed), "--batch-size", size, "--temperature", "0", "--restart"]
        outcome = run("--output", str(output), *more)
        assert outcome.code == 0, outcome.error
        tree = read(output)
        for n in without:
            assert tree["items"][n] == expected[n] | {"item": n}
        for n in (4, 10):
            item = tree["items"][n]
            assert (item["right"], item["answer"], item["steps"]) == (False, "", 0)
            assert item["found"] == "not answered: the prompt leaves no room"
        right = sum(item["right"] for item in expected.values())
        figures = tree["figures"]
        assert (figures["total"], figures["not_answered"], figures["accuracy"]) == (11, 2, right / 11)
        assert "2 of 11 items have a prompt that leaves no room for an answer" in outcome.output
    mixed.write_text(long * 2)
    assert "prompt 1 of 2, 'abcdef', has 6 tokens" in run("--data", str(mixed)).complaint()


def test_damaged_items_of_an_interrupted_evaluation(run: Evaluate, tmp_path: Path) -> None:
    """The item of a damaged line is measured again; a file without settings is refused by name."""
    whole, output = tmp_path / "whole.json", tmp_path / "results.json"
    assert run("--output", str(whole), "--limit", "5").code == 0
    tree = read(whole)
    part = tmp_path / "results.items.0.jsonl"
    lines = [json.dumps(line) for line in ({"settings": tree["settings"]}, *tree["items"][:3])]
    lines[2] = "\0" * 20
    part.write_text("\n".join(lines) + "\n")
    outcome = run("--output", str(output), "--limit", "5")
    assert (outcome.code, outcome.error) == (0, "")
    assert f"{part}, line 3 is damaged" in outcome.output
    assert output.read_bytes() == whole.read_bytes()
    output.unlink()
    for bad in (lines[1:2] * 2, ["3", "4"], [lines[0], "[1]"]):
        part.write_text("\n".join(bad) + "\n")
        complaint = run("--output", str(output), "--limit", "5").complaint()
        assert f"{part} is damaged: remove it to measure its items again" in complaint


def test_another_step_is_another_evaluation(run: Evaluate, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert run("--output", str(output), "--checkpoint", f"{run_dir}:4", "--limit", "5").code == 0
    tree = read(output)
    assert tree["settings"]["--checkpoint"].endswith("step_00000004")
    assert tree["figures"]["total"] == 5
    complaint = run("--output", str(output), "--limit", "5").complaint()
    assert "was made with --checkpoint = " in complaint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--task", "exacto"], "--task.*exacto"),
        (["--batch-size", "0"], "--batch-size is 0: it must be 1 or more"),
        (["--length", "12"], "exceeds the trained sequence length 12"),
        (["--prompt-format", "Q: "], "--prompt-format is 'Q: ': it must contain {prompt}"),
        (["--task", "likelihood", "--draws", "3"], "--draws is 3: give an even number"),
        (["--top-k", "3", "--temperature", "0"], "no effect at temperature 0"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--checkpoint", "nowhere:7"], "nowhere/checkpoints/step_00000007 holds no checkpoint"),
        (["--prompt-key", "question"], "no key 'question'"),
        (["--samples", "3"], "unknown option '--samples'"),
        (["--text-key", "text"], "--text-key has no effect with --task exact"),
        (
            ["--task", "likelihood", "--prompt-format", "Q{prompt}"],
            "--prompt-format has no effect with --task l",
        ),
        (["--task", "likelihood", "--length", "4"], "--length has no effect with --task likelihood"),
        (["--task", "likelihood", "--threshold", "0.9"], "--threshold has no effect with --task likelihood"),
        (["--draws", "4"], "--draws has no effect with --task exact"),
        (["--chat-template", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(run: Evaluate, changes: list[str], message: str) -> None:
    assert re.search(message, run(*changes).complaint())


def test_a_file_that_holds_no_results_is_kept(run: Evaluate, tmp_path: Path) -> None:
    for content in ("precious", "[1]", '{"items": 3}'):
        output = tmp_path / "mine.json"
        output.write_text(content)
        assert "mine.json holds no results" in run("--output", str(output)).complaint()
        assert output.read_text() == content


def test_the_items_are_not_replaced_by_the_results(run: Evaluate, data: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_bytes((data / "corpus.jsonl").read_bytes())
    more = ["--data", str(items), "--output", f"{tmp_path}/../{tmp_path.name}/items.jsonl", "--restart"]
    assert "items.jsonl is also --data, the file of items" in run(*more).complaint()
    assert items.read_bytes() == (data / "corpus.jsonl").read_bytes()


def test_outputs_that_differ_behind_a_full_stop(
    run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that differ only after a full stop (v1.2, v1.3) do not share files of finished items."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Results, "finish", interrupt)
        assert run("--output", str(tmp_path / "v1.2"), "--limit", "3").code == 130
    assert run("--output", str(tmp_path / "v1.3"), "--limit", "4").code == 0
    assert run("--output", str(tmp_path / "v1.2"), "--limit", "3").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.2", "v1.3"]


def test_the_prompt_format(run: Evaluate, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    assert (
        run("--output", str(output), "--limit", "2", "--prompt-format", "a{prompt}b", "--length", "3").code
        == 0
    )
    corpus = read(output)["items"]
    assert all(item["prompt"].startswith("a") and item["prompt"].endswith("b") for item in corpus)


def test_a_chat_template_writes_the_prompt(run: Evaluate, run_dir: Path, tmp_path: Path) -> None:
    """As a prompt format does, and with special tokens; the answer ends at any of these."""
    tokenizer = load_model(run_dir, torch.device("cpu")).tokenizer
    template, end = tmp_path / "c.jinja", tokenizer.model.token(tokenizer.eos)
    items = []
    for text, more in (
        ("f{{ messages[0].content }}", ["--chat-template", str(template)]),
        ("", ["--prompt-format", "f{prompt}"]),
        (end + "{{ messages[0].content }}", ["--chat-template", str(template)]),
    ):
        template.write_text(text)
        outcome = run("--output", str(tmp_path / "r.json"), "--restart", "--length", "6", *more)
        assert outcome.code == 0, outcome.error
        items.append(read(tmp_path / "r.json")["items"])
    assert items[0] == items[1]
    assert [row["prompt"] for row in items[2]] == [end + row["prompt"][1:] for row in items[1]]
    assert 0 not in {row["steps"] for row in items[2]}, "one token: the letters of its name would not fit"
    assert not any("<" in row["answer"] for row in items[2])


@pytest.mark.parametrize("source", ["jsonl", "dataset"])
def test_likelihood(run: Evaluate, data: Path, tmp_path: Path, source: str) -> None:
    """Mean, perplexity and bits per byte are recomputed from the items; both sources hold the same pairs."""
    output = tmp_path / "likelihood.json"
    where = ["--data", str(data / ("corpus.jsonl" if source == "jsonl" else "pairs"))]
    outcome = run("--task", "likelihood", "--draws", "4", "--output", str(output), *where)
    assert outcome.code == 0, outcome.error
    tree = read(output)
    nll, tokens, size = (
        np.array([item[key] for item in tree["items"]]) for key in ("nll", "tokens", "bytes")
    )
    figures = tree["figures"]
    assert figures["sequences"] == len(nll) == 60
    assert figures["nll"] == pytest.approx(nll.mean())
    assert figures["standard_error"] == pytest.approx(nll.std(ddof=1) / 60**0.5)
    assert figures["perplexity"] == pytest.approx(math.exp(nll.sum() / tokens.sum()))
    assert figures["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / size.sum())
    answers = [json.loads(line)["answer"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    assert size.tolist() == [len(answer) for answer in answers]
    end = source == "dataset"  # its answers end with an end-of-sequence token
    assert tokens.tolist() == [len(answer) + end for answer in answers]
    assert "bits per byte, 60 sequences" in outcome.output


def test_ends_are_scored_where_they_are_trained(
    train: Callable[..., Outcome], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Likelihoods equal those of the training examples, which are padded with end-of-sequence tokens."""
    assert train(tmp_path / "run", "--data.padding", "eos_targets", "--evaluation.interval", "0").code == 0
    loaded = load_model(tmp_path / "run", torch.device("cpu"))
    settings = replace(loaded.config.data, split="100,0,0")
    facts = check_data(settings, loaded.tokenizer)
    dataset = build_datasets(settings, facts, loaded.tokenizer, 0, tmp_path / "cache", Ranks()).train
    examples = stack_examples([dataset[i] for i in range(60)], range(60))
    expected = estimate(loaded.model, loaded.layout, examples, loaded.step, draws=64)
    for source in ("corpus.jsonl", "pairs"):
        arguments = ["--checkpoint", str(tmp_path / "run"), "--task", "likelihood", "--draws", "64"]
        arguments += ["--data", str(data / source), "--output", str(tmp_path / f"{source}.json")]
        assert run_here(evaluate.main, arguments, capsys).code == 0
        items = read(tmp_path / f"{source}.json")["items"]
        assert [item["tokens"] for item in items] == expected.tokens.tolist()
        assert [item["nll"] for item in items] == pytest.approx(expected.nll.tolist(), rel=1e-5)


def test_long_texts_are_scored_in_pieces(run: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "' + "abcdef" * 5 + '"}\n{"text": "fed"}\n')
    output = tmp_path / "r.json"
    texts = ["--data", str(tmp_path / "texts.jsonl"), "--text-key", "text", "--draws", "4"]
    assert run("--task", "likelihood", "--output", str(output), *texts).code == 0
    assert [item["tokens"] for item in read(output)["items"]] == [12, 12, 6, 3]


def test_pairs_that_are_too_long_are_left_out(run: Evaluate, data: Path, tmp_path: Path) -> None:
    """Excluded pairs are counted, and do not affect the figures."""
    lines = (data / "corpus.jsonl").read_text().splitlines(keepends=True)[:5]
    long = json.dumps({"prompt": "abcdef", "answer": "abcdefa"}) + "\n"  # 13 tokens, of 12
    likelihood = ["--task", "likelihood", "--draws", "4", "--output", str(tmp_path / "r.json"), "--restart"]
    figures = []
    for content in ([*lines, long, long], lines):
        (tmp_path / "x.jsonl").write_text("".join(content))
        outcome = run(*likelihood, "--data", str(tmp_path / "x.jsonl"))
        assert outcome.code == 0, outcome.error
        figures.append(read(tmp_path / "r.json")["figures"])
        many = len(content) - 5
        assert ("2 pairs exceed the trained sequence length" in outcome.output) == (many == 2)
        assert figures[-1].pop("too_long") == many
    assert figures[0] == figures[1]
    (tmp_path / "x.jsonl").write_text(long)
    complaint = run(*likelihood, "--data", str(tmp_path / "x.jsonl")).complaint()
    assert "x.jsonl holds nothing to score (1 pairs longer than 12" in complaint


def test_a_dataset_of_another_tokenizer(run: Evaluate, data: Path, tmp_path: Path) -> None:
    for name in ("pairs.bin", "pairs.idx"):
        (tmp_path / name).symlink_to(data / name)
    facts = json.loads((data / "pairs.json").read_text()) | {"tokenizer_sha256": "0" * 64}
    (tmp_path / "pairs.json").write_text(json.dumps(facts))
    complaint = run("--task", "likelihood", "--data", str(tmp_path / "pairs")).complaint()
    assert "was made with another tokenizer" in complaint


@pytest.mark.distributed
def test_several_ranks_find_the_same(run: Evaluate, run_dir: Path, data: Path, tmp_path: Path) -> None:
    """Two ranks resume an evaluation of one rank; the result file is equal byte for byte."""
    alone, output = tmp_path / "alone.json", tmp_path / "both.json"
    assert run("--output", str(alone)).code == 0
    tree = read(alone)
    lines = [{"settings": tree["settings"]}, *tree["items"][3:8]]
    (tmp_path / "both.items.0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_forked(
        str(ROOT / "tools/evaluate.py"), "--checkpoint", str(run_dir), "--task", "exact",
        "--data", str(data / "corpus.jsonl"), "--length", "7", "--temperature", "1", "--batch-size", "4",
        "--output", str(output), ranks=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert output.read_bytes() == alone.read_bytes()
    assert result.stdout.count("items") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.json", "both.json"]
