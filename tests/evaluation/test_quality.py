"""Generative perplexity against a language of bigrams, whose probabilities are known in closed form."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import load_model
from pipeline.evaluation.intervals import Z95, ratio_interval
from pipeline.evaluation.quality import distinct, entropy, text_behind
from pipeline.evaluation.scorers import RunScorer, TransformersScorer, Window, score_texts, windows_of
from support.bigrams import LETTERS, bigram, surprise, write_bigram
from support.forked import run_forked
from support.programs import Outcome, run_here
from tools import evaluate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def table() -> Any:
    return bigram()


@pytest.fixture(scope="module")
def folder(table: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigram(tmp_path_factory.mktemp("bigram"), table)


def test_scores_are_those_of_the_language(folder: Path, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one forward or in several; an empty text has no score, and an unknown character counts."""
    scorer = TransformersScorer(folder, CPU)
    texts = [("", "abcabc"), ("abc", "gfe"), ("ab", ""), ("", "aé"), ("g", "a" * 40), ("", "<s>")]
    expected = [surprise(table, text, prompt) for prompt, text in texts]
    for most in (2**27, 1):
        monkeypatch.setattr("pipeline.evaluation.scorers.LOGITS", most)
        found = score_texts(scorer, texts)
        assert [one.nll for one in found] == pytest.approx(expected, rel=1e-5)
    assert [len(one.ids) for one in found] == [6, 3, 0, 2, 40, 3], "<s> in a text is three characters"
    assert [one.bytes for one in found] == [6, 3, 0, 3, 40, 3]


def test_long_texts_are_scored_in_windows(table: Any, tmp_path: Path) -> None:
    """A bigram needs one token of context, so windows change nothing."""
    scorer = TransformersScorer(write_bigram(tmp_path, table, limit=8), CPU)
    texts = [("", "abcdefg" * 5), ("abcdefgabc", "gfedcba" * 3), ("abcdef", "g")]
    found = [one.nll for one in score_texts(scorer, texts)]
    assert found == pytest.approx([surprise(table, text, prompt) for prompt, text in texts], rel=1e-5)


@pytest.mark.parametrize(
    ("first", "total", "limit"), [(1, 30, 8), (7, 30, 8), (20, 21, 8), (1, 5, 8), (3, 9, 2)]
)
def test_windows_score_each_token_once_with_enough_before_it(first: int, total: int, limit: int) -> None:
    ids = list(range(total))
    windows = list(windows_of(ids, first, limit))
    assert [token for window in windows for token in window.ids[window.first :]] == ids[first:]
    for window in windows:
        assert len(window.ids) <= limit
        for place in range(window.first, len(window.ids)):
            assert place >= min(limit // 2, window.ids[place]), "half of the limit, or all there is"


def test_a_token_across_the_boundary_belongs_to_the_text(folder: Path, table: Any) -> None:
    class Pairs:
        """Encodes two characters as one token."""

        limit, begin, unknown = 64, 0, None

        def encode(self, text: str) -> list[int]:
            return [1 + sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]

        def nll(self, windows: list[Window]) -> list[float]:
            return [float(len(window.ids) - window.first) for window in windows]

    odd, even = score_texts(Pairs(), [("abc", "de"), ("ab", "cde")])
    assert (odd.nll, len(odd.ids), odd.bytes) == (2.0, 2, 2), "cd and e"
    assert (even.nll, len(even.ids), even.bytes) == (2.0, 2, 3)


def test_entropy_and_distinct_ngrams() -> None:
    assert entropy([3, 3, 3]) == 0
    assert entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert entropy([1, 1, 2]) == pytest.approx(-(2 / 3) * math.log(2 / 3) - math.log(1 / 3) / 3)
    texts = [[1, 2, 1, 2], [1, 2, 3], [5]]
    assert distinct(texts, 1) == 4 / 8
    assert distinct(texts, 2) == 3 / 5  # 12 21 12 | 12 23
    assert distinct(texts, 3) == 3 / 3
    assert distinct([[1]], 2) is None


def test_the_interval_of_a_ratio() -> None:
    """For equal denominators it is that of a mean; for others it covers the ratio 95 times in 100."""
    values = [1.0, 4.0, 2.5, 3.0]
    half = Z95 * np.std(values, ddof=1) / 2
    assert ratio_interval(values, [2.0] * 4) == pytest.approx(((2.625 - half) / 2, (2.625 + half) / 2))
    assert ratio_interval([1.0], [2.0]) is None
    random, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        tokens = random.integers(1, 20, 100)
        nats = random.gamma(tokens * 2.0)  # mean 2 a token
        low, high = ratio_interval(nats.tolist(), tokens.tolist()) or (0, 0)
        inside += low < 2 < high
    assert 930 <= inside <= 968


def test_an_autoregressive_run_scores_by_the_chain_rule(
    train: Callable[..., Outcome], run_dir: Path, tmp_path: Path
) -> None:
    assert (
        train(tmp_path / "run", "--objective.kind", "autoregressive", "--model.prediction", "shifted").code
        == 0
    )
    scorer = RunScorer(tmp_path / "run", CPU)
    [whole] = score_texts(scorer, [("ab", "bagg")])
    ids = [scorer.begin, *scorer.encode("abbagg")]
    each = scorer.nll([Window(ids[: i + 1], i) for i in range(3, 7)])
    assert whole.nll == pytest.approx(sum(each), rel=1e-5)
    following = np.exp([-scorer.nll([Window([*ids[:3], token], 3)])[0] for token in range(12)])
    assert following.sum() == pytest.approx(1, abs=1e-4), "a distribution over all tokens"
    with pytest.raises(UserError, match="is a masked diffusion model, which only bounds a likelihood"):
        RunScorer(run_dir, CPU)


def test_text_behind_a_prompt(run_dir: Path) -> None:
    tokenizer = load_model(run_dir, CPU).tokenizer
    ids = tokenizer.encode("abcd").tolist()
    assert text_behind(tokenizer, ids[:2], [*ids[2:], tokenizer.eos]) == ("ab", "cd")
    assert text_behind(tokenizer, [], [tokenizer.eos]) == ("", "")


# The program.

Evaluate = Callable[..., Outcome]
TASK = "generative-perplexity"


@pytest.fixture
def run(run_dir: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Return a function that samples answers of the run on the corpus it was trained on, and scores them."""

    def evaluated(*more: str) -> Outcome:
        first = ["--checkpoint", str(run_dir), "--task", TASK, "--data", str(data / "corpus.jsonl")]
        first += ["--scorer", str(folder), "--temperature", "1", "--batch-size", "7"]
        return run_here(evaluate.main, [*first, *more], capsys)

    return evaluated


def read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree


def recomputed(texts: list[dict[str, Any]], prompts: list[str], table: Any) -> dict[str, Any]:
    """Return the figures of texts, from the texts and the bigrams alone."""
    full = [(text["text"], prompt) for text, prompt in zip(texts, prompts, strict=True) if text["text"]]
    nll = np.array([surprise(table, *one) for one in full])
    size = np.array([len(text) for text, _ in full])
    ids = [[LETTERS.find(character) for character in text] for text, _ in full]  # -1: unknown
    found = {
        "samples": len(texts),
        "empty": len(texts) - len(full),
        "perplexity": math.exp(nll.sum() / size.sum()),
        "bits_per_byte": nll.sum() / sum(len(text.encode()) for text, _ in full) / math.log(2),
        "entropy": np.mean([entropy(each) for each in ids]),
        "tokens_per_text": size.mean(),
        "unknown": sum(each.count(-1) for each in ids),
    }
    for n in (1, 2, 3):
        grams = Counter(tuple(each[i : i + n]) for each in ids for i in range(len(each) - n + 1))
        found[f"distinct_{n}"] = len(grams) / grams.total()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", ["pairs", "dataset", "texts", "unconditional"])
def test_figures_are_those_of_the_samples(
    run: Evaluate, data: Path, tmp_path: Path, table: Any, source: str
) -> None:
    corpus = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    more, prompts = ["--output", str(tmp_path / "r.json")], [row["prompt"] for row in corpus]
    truths = [row["answer"] for row in corpus]
    if source == "dataset":
        more += ["--data", str(data / "pairs")]
    if source in ("texts", "unconditional"):
        cut = 3 if source == "texts" else 0
        texts = [row["prompt"] + row["answer"] for row in corpus]
        more += ["--data", str(tmp_path / "x.jsonl"), "--text-key", "t", "--prefix-length", str(cut)]
        more += ["--length", "5"]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"t": text}) + "\n" for text in texts))
        texts = [text for text in texts if len(text) > cut]
        prompts, truths = [text[:cut] for text in texts], [text[cut : cut + 5] for text in texts]
    outcome = run(*more)
    assert (outcome.code, outcome.error) == (0, "")
    tree = read(tmp_path / "r.json")
    assert [row["prompt"] for row in tree["items"]] == prompts
    assert [row["reference"]["text"] for row in tree["items"]] == truths
    for kind, figures in (("sample", tree["figures"]), ("reference", tree["figures"]["reference"])):
        expected = recomputed([row[kind] for row in tree["items"]], prompts, table)
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        low, high = figures["perplexity_interval"]
        assert low < figures["perplexity"] < high
    assert len({row["sample"]["text"] for row in tree["items"]}) > 20, "other noise for each sample"
    shown = outcome.output.splitlines()
    shown = [line for line in shown if "does not know" not in line]
    assert shown[-2].startswith(f"samples: perplexity {tree['figures']['perplexity']:.3f}, 95% interval ")
    assert shown[-1].startswith(f"true texts: perplexity {tree['figures']['reference']['perplexity']:.3f}, ")
    assert run(*more).code == 0
    assert read(tmp_path / "r.json") == tree, "all items are finished"
    assert (
        "was made with --temperature = 1.0, now it is 0.5" in run(*more, "--temperature", "0.5").complaint()
    )


@pytest.mark.slow
def test_two_ranks_find_the_same(
    run: Evaluate, run_dir: Path, data: Path, folder: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert run("--output", str(one)).code == 0
    command = ["tools/evaluate.py", "--checkpoint", str(run_dir), "--task", TASK, "--scorer", str(folder)]
    command += ["--data", str(data / "corpus.jsonl"), "--temperature", "1", "--output", str(two)]
    outcome = run_forked(*command, ranks=2)
    assert outcome.returncode == 0, outcome.stderr
    found, expected = read(two), read(one)
    assert [row["sample"]["text"] for row in found["items"]] == [
        row["sample"]["text"] for row in expected["items"]
    ]
    assert found["figures"]["perplexity"] == pytest.approx(expected["figures"]["perplexity"], rel=1e-6)


@pytest.mark.slow
def test_empty_samples_are_counted(
    run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    """They have no perplexity; where all are empty, the figures are null."""
    from pipeline.decoding.completing import Completion
    from pipeline.evaluation import quality

    eos = load_model(run_dir, CPU).tokenizer.eos

    def nothing(*arguments: Any, **more: Any) -> list[Completion]:
        return [Completion("", [eos], [0], 1) for _ in arguments[1]]

    monkeypatch.setattr(quality, "fill_sequences", nothing)
    outcome = run("--output", str(tmp_path / "r.json"))
    assert outcome.code == 0, outcome.error
    assert "60 of 60 samples are empty: not scored" in outcome.output
    figures = read(tmp_path / "r.json")["figures"]
    assert (figures["empty"], figures["perplexity"], figures["distinct_1"]) == (60, None, None)
    assert figures["reference"]["perplexity"] > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--scorer", "nowhere"],
            "--scorer: nowhere holds no checkpoint: .* Or give a folder of a causal model",
        ),
        (["--scorer", "RUN"], "--scorer .* is a masked diffusion model"),
        (["--scorer", "EMPTY"], "--scorer .* holds no causal model that transformers loads"),
        (["--scorer", "BERT"], "--scorer .* is not causal: its predictions depend on later tokens"),
        (["--scorer", "NAMELESS"], "its tokenizer names neither bos_token nor eos_token"),
        (["--scorer", "SMALL"], "its tokenizer has ids up to 8, but the model has 5 rows"),
        (["--task", "exact"], "--scorer has no effect with --task exact"),
        (["--draws", "4"], "--draws has no effect with --task generative-perplexity"),
        (["--prefix-length", "-1"], "--prefix-length is -1: it must be 0 or more"),
        (["--prefix-length", "2"], "--prefix-length is 2, but .* holds pairs"),
        (["--text-key", "prompt", "--temperature", "0"], "--temperature is 0: all samples without a prompt"),
        (["--text-key", "prompt", "--prefix-length", "11"], "holds no document with text behind its prompt"),
    ],
)
def test_bad_input_is_one_line(
    run: Evaluate, run_dir: Path, table: Any, folder: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    made = {"RUN": run_dir, "EMPTY": tmp_path, "BERT": tmp_path, "NAMELESS": tmp_path, "SMALL": tmp_path}
    kind = changes[-1]
    if kind == "EMPTY":
        (tmp_path / "config.json").write_text("{}")
    if kind in ("NAMELESS", "SMALL"):
        names = {"pad_token": "<s>"} if kind == "NAMELESS" else {}
        write_bigram(tmp_path, table, **names)
        if kind == "SMALL":
            write_bigram(tmp_path / "small", table[:5, :5])
            for name in ("config.json", "model.safetensors"):
                (tmp_path / "small" / name).rename(tmp_path / name)
    if kind == "BERT":
        write_bigram(tmp_path, table)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        config.initializer_range = 1.0
        BertLMHeadModel(config).save_pretrained(tmp_path)
    assert re.search(message, run(*(str(made.get(part, part)) for part in changes)).complaint())
