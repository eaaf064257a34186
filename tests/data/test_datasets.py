"""Examples built by megatron-core: packed text, pairs, blends, splits."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.config import DataConfig
from pipeline.corpus.records import Keys
from pipeline.corpus.tokenizer_making import train_tokenizer
from pipeline.data.blend import Order, blend_sizes, build_once, describe_order, write_order
from pipeline.data.datasets import Datasets, build_datasets
from pipeline.data.examples import ANSWER, PADDING, PROMPT, ExampleDataset
from pipeline.data.facts import check_data
from pipeline.ranks import Ranks
from support.corpora import make_dataset
from support.forked import run_forked
from support.pickles import Command

pytestmark = pytest.mark.slow

ALPHABET = "abcdefghij"


class Corpus:
    """Two pair datasets and one text dataset over a character tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        random = np.random.default_rng(0)
        self.tokenizer = train_tokenizer([ALPHABET], 32, "char", folder / "tokenizer")
        self.pairs: dict[str, list[tuple[str, str]]] = {}
        for name, count in (("p", 40), ("q", 10)):
            texts = [
                "".join(random.choice(list(ALPHABET), int(random.integers(1, 7)))) for _ in range(2 * count)
            ]
            self.pairs[name] = list(zip(texts[::2], texts[1::2], strict=True))
            self.write(name, [{"a": a, "b": b} for a, b in self.pairs[name]], Keys(("a", "b")))
        self.text = ["".join(random.choice(list(ALPHABET), int(random.integers(1, 60)))) for _ in range(50)]
        self.write("t", [{"text": text} for text in self.text], Keys(("text",)))

    def write(self, name: str, lines: list[dict[str, str]], keys: Keys) -> None:
        """Preprocess lines into the dataset `name`."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        eos = not keys.is_pair
        make_dataset([path], self.folder / "tokenizer", self.folder / name, keys, append_eos=eos)

    def build(self, prefixes: str, **settings: object) -> Datasets:
        """Build the datasets named by the letters of `prefixes`."""
        config = DataConfig(
            tokenizer=str(self.folder / "tokenizer"),
            prefixes=[str(self.folder / p) for p in prefixes],
            **settings,
        )  # type: ignore[arg-type]
        facts = check_data(config, self.tokenizer)
        return build_datasets(config, facts, self.tokenizer, 1, self.folder / "cache", Ranks())

    def decoded(self, example: dict[str, np.ndarray]) -> tuple[str, str, int]:
        """Return prompt, answer and padding count of an example."""
        parts = [self.tokenizer.decode(example["tokens"][example["roles"] == r]) for r in (PROMPT, ANSWER)]
        return parts[0], parts[1], int((example["roles"] == PADDING).sum())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """Return the corpus; megatron-core's blends ask torch.distributed for the rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Corpus(tmp_path_factory.mktemp("corpus"))
    torch.distributed.destroy_process_group()


def test_pairs_are_whole_and_in_one_split(corpus: Corpus) -> None:
    """Every document in exactly one of training and validation, roles as they should be."""
    data = corpus.build("p", kind="pairs", sequence_length=16, split="75,25,0")
    assert data.valid is not None
    assert (len(data.train), len(data.valid)) == (30, 10)
    assert data.has_padding
    found = []
    for part in (data.train, data.valid):
        for index in range(len(part)):
            example = part[index]
            prompt, answer, padding = corpus.decoded(example)
            assert len(prompt) + len(answer) + padding == 16
            assert (np.diff(np.array([2, 0, 1])[example["roles"]]) >= 0).all(), "prompt, answer, padding"
            found.append((prompt, answer))
    assert Counter(found) == Counter(corpus.pairs["p"])


def test_padding_can_be_targets(corpus: Corpus) -> None:
    data = corpus.build("p", kind="pairs", sequence_length=16, split="100,0,0", padding="eos_targets")
    assert not data.has_padding
    example = data.train[0]
    prompt, answer, padding = corpus.decoded(example)
    assert padding == 0
    assert (example["tokens"][len(prompt) + len(answer) :] == corpus.tokenizer.eos).all()
    assert (example["roles"][len(prompt) :] == ANSWER).all()


def test_packed_text_is_the_text(corpus: Corpus) -> None:
    """Examples of L tokens cut from documents closed by end-of-sequence; at most the last one is lost."""
    data = corpus.build("t", kind="packed", sequence_length=32, split="100,0,0")
    assert data.valid is None
    assert not data.has_padding
    tokens = sum(len(text) + 1 for text in corpus.text)
    assert len(data.train) == tokens // 32
    documents = Counter(corpus.text)
    for index in range(len(data.train)):
        example = data.train[index]
        assert example["tokens"].shape == (32,)
        assert (example["roles"] == ANSWER).all()
        ids = example["tokens"].tolist()
        inside = "".join("|" if i == corpus.tokenizer.eos else corpus.tokenizer.decode([i]) for i in ids)
        for whole in inside.split("|")[1:-1]:
            assert documents[whole] > 0


def test_documents_are_told_apart_without_looking_at_tokens(corpus: Corpus) -> None:
    """Documents end behind each end-of-sequence token; without isolate_documents nothing is told."""
    together = corpus.build("t", kind="packed", sequence_length=32, split="100,0,0")
    apart = corpus.build("t", kind="packed", sequence_length=32, split="100,0,0", isolate_documents=True)
    assert apart.fingerprint != together.fingerprint
    assert len(apart.train) == len(together.train)
    boundaries = 0
    for index in range(len(apart.train)):
        example = apart.train[index]
        assert "documents" not in together.train[index]
        assert (example["tokens"] == together.train[index]["tokens"]).all()
        ends = (example["tokens"] == corpus.tokenizer.eos).astype(np.int32)
        assert (example["documents"] == np.cumsum(ends) - ends).all()
        boundaries += int(ends.sum())
    assert boundaries > 40
    with pytest.raises(UserError, match=r"data.isolate_documents is True, .* data.kind = 'pairs'.*leave it"):
        DataConfig(prefixes=["x"], kind="pairs", isolate_documents=True).check(1)


def test_training_examples_alone_are_cut_to_random_lengths(corpus: Corpus) -> None:
    whole = corpus.build("t", kind="packed", sequence_length=32, split="60,40,0")
    cut = corpus.build("t", kind="packed", sequence_length=32, split="60,40,0", random_length_share=0.5)
    assert (whole.has_padding, cut.has_padding) == (False, True)
    assert cut.fingerprint != whole.fingerprint
    assert cut.valid is not None
    assert not any((cut.valid[index]["roles"] == PADDING).any() for index in range(len(cut.valid)))
    padded = [index for index in range(len(cut.train)) if (cut.train[index]["roles"] == PADDING).any()]
    assert 0 < len(padded) < len(cut.train) == len(whole.train)
    assert cut.train[padded[0]]["tokens"][-1] == corpus.tokenizer.pad


def test_a_blend_without_weights_uses_everything_once(corpus: Corpus) -> None:
    data = corpus.build("pq", kind="pairs", sequence_length=16, split="100,0,0")
    found = Counter(corpus.decoded(data.train[index])[:2] for index in range(len(data.train)))
    assert found == Counter(corpus.pairs["p"] + corpus.pairs["q"])


def test_weights_are_shares_of_the_samples(corpus: Corpus) -> None:
    """1 : 1 of 40 and 10 documents: 25 each, so the smaller one is used 2.5 times."""
    data = corpus.build("pq", kind="pairs", sequence_length=16, split="100,0,0", weights=[3.0, 3.0])
    assert len(data.train) == 50
    found = Counter(corpus.decoded(data.train[index])[:2] for index in range(50))
    from_q = Counter({pair: count for pair, count in found.items() if pair in corpus.pairs["q"]})
    assert abs(from_q.total() - 25) <= 1
    assert set(from_q) == set(corpus.pairs["q"])
    assert set(from_q.values()) <= {2, 3}


def test_the_fingerprint_follows_the_data(corpus: Corpus) -> None:
    base = corpus.build("p", kind="pairs", sequence_length=16)
    assert corpus.build("p", kind="pairs", sequence_length=16).fingerprint == base.fingerprint
    others = [
        corpus.build("q", kind="pairs", sequence_length=16),
        corpus.build("p", kind="pairs", sequence_length=17),
        corpus.build("p", kind="pairs", sequence_length=16, split="50,50,0"),
        corpus.build("p", kind="pairs", sequence_length=16, padding="eos_targets"),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("prefixes", "settings", "message"),
    [
        (
            "t",
            {"kind": "packed", "sequence_length": 10**6},
            r"no training example of data.sequence_length = 1000000",
        ),
        ("p", {"kind": "packed", "sequence_length": 8}, r"holds pairs, but data.kind is 'packed'"),
        ("t", {"kind": "pairs", "sequence_length": 8}, r"holds text, but data.kind is 'pairs'"),
        (
            "p",
            {"kind": "pairs", "sequence_length": 4},
            r"its longest document has \d+ tokens, more than data.sequence_length = 4",
        ),
        ("p", {"kind": "pairs", "sequence_length": 1, "too_long": "drop"}, r"no training example"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    corpus: Corpus, prefixes: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        corpus.build(prefixes, split="100,0,0", **settings)


def test_an_answer_of_length_0_is_refused(corpus: Corpus) -> None:
    """Also in a dataset that another program wrote."""
    from pipeline.data.indexed import Part, token_dtype, write_dataset

    corpus.write("z", [{"a": "a", "b": "b"}, {"a": "a", "b": "b"}], Keys(("a", "b")))
    part = corpus.folder / "part"
    part.write_bytes(np.array([5, 6, 7, 8], np.uint16).tobytes())
    lengths = np.array([1, 2, 1, 0], np.int32)
    facts = (corpus.folder / "z.json").read_bytes()
    dtype = token_dtype(16)
    write_dataset(Part(part, lengths).chunks(dtype), corpus.folder / "z", dtype, True)
    (corpus.folder / "z.json").write_bytes(facts)
    with pytest.raises(UserError, match=r"document 1 has an answer of length 0"):
        corpus.build("z", kind="pairs", sequence_length=8, split="100,0,0")


@given(
    examples=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    weights=st.lists(st.floats(0.01, 100), min_size=6, max_size=6),
    caps=st.lists(st.floats(0.5, 5), min_size=6, max_size=6),
)
def test_blend_sizes_fill_up_like_water(examples: list[int], weights: list[float], caps: list[float]) -> None:
    """The oracle finds one level for all by bisection: each gives min(cap, weight x level)."""
    weights, caps = weights[: len(examples)], caps[: len(examples)]
    limits = [cap * n for cap, n in zip(caps, examples, strict=True)]
    low, high = 0.0, max(limit / weight for limit, weight in zip(limits, weights, strict=True))
    for _ in range(200):
        level = (low + high) / 2
        total = sum(min(limit, weight * level) for limit, weight in zip(limits, weights, strict=True))
        low, high = (level, high) if total < sum(examples) else (low, level)
    expected = [min(limit, weight * high) for limit, weight in zip(limits, weights, strict=True)]
    found = blend_sizes(examples, weights, caps)
    for one, other in zip(found, expected, strict=True):
        assert abs(one - max(1, other)) <= 1 + 1e-6 * other
    plain = blend_sizes(examples, weights, None)
    for one, weight in zip(plain, weights, strict=True):
        assert abs(one - max(1, sum(examples) * weight / sum(weights))) <= 1 + 1e-6 * one


def test_temperature_and_caps(corpus: Corpus) -> None:
    """Shares follow tokens^(1/T); a capped dataset gives no more than it may, the other fills the epoch."""
    base = {"kind": "pairs", "sequence_length": 16, "split": "100,0,0"}
    tokens = [sum(len(a) + len(b) for a, b in corpus.pairs[name]) for name in "pq"]
    for temperature in (1.0, 3.0):
        data = corpus.build("pq", temperature=temperature, **base)
        powers = [count ** (1 / temperature) for count in tokens]
        assert [share.used for share in data.shares] == [int(50 * power / sum(powers)) for power in powers]
        assert [share.tokens for share in data.shares] == tokens
    data = corpus.build("pq", weights=[1.0, 1.0], max_epochs=[9.0, 2.0], **base)
    assert [(share.examples, share.used, share.epochs) for share in data.shares] == [
        (40, 30, 0.75),
        (10, 20, 2.0),
    ]
    found = Counter(corpus.decoded(data.train[index])[:2] for index in range(len(data.train)))
    assert sum(found[pair] for pair in set(corpus.pairs["q"])) == 20
    text = describe_order(data.shares)
    assert "20 (40.0%), 2.00 epochs of 10 examples" in text


def test_a_small_dataset_may_join_a_blend(corpus: Corpus) -> None:
    """Its few documents give no validation example; those of the other are the validation examples."""
    for kind, small, large in (("pairs", "q", "p"), ("packed", "s", "t")):
        if kind == "packed":
            corpus.write("s", [{"text": ALPHABET * 2}], Keys(("text",)))
        data = corpus.build(small + large, kind=kind, sequence_length=16, split="96,4,0")
        alone = corpus.build(large, kind=kind, sequence_length=16, split="96,4,0")
        assert data.valid is not None
        assert alone.valid is not None
        assert len(data.valid) == len(alone.valid) > 0
        assert [share.prefix[-1] for share in data.shares] == [small, large]
    corpus.write("u", [{"text": "ab"}], Keys(("text",)))
    with pytest.raises(UserError, match=r"/u gives no training example of data.sequence_length = 16"):
        corpus.build("ut", kind="packed", sequence_length=16, split="96,4,0")


def test_validation_examples_of_some_datasets(corpus: Corpus) -> None:
    """Those of each dataset are the ones that it has alone; one without any gives none."""
    corpus.write("v", [{"a": "a", "b": "b"}], Keys(("a", "b")))
    settings = {"kind": "pairs", "sequence_length": 16, "split": "75,25,0"}
    data = corpus.build("qpv", **settings)
    apart = {name: corpus.build(name, **settings) for name in "pq"}

    def texts(valid: ExampleDataset | None) -> list[tuple[str, str, int]]:
        assert valid is not None
        return [corpus.decoded(valid[index]) for index in range(len(valid))]

    for name, alone in apart.items():
        assert texts(data.valid_of({str(corpus.folder / name)})) == texts(alone.valid) != []
        assert alone.valid_of(set()) is None
    every = {str(corpus.folder / name) for name in "pqv"}
    assert data.valid_of(every) is data.valid
    assert data.valid_of(every - {str(corpus.folder / "v")}) is data.valid
    assert data.valid_of({str(corpus.folder / "v")}) is data.valid_of(set()) is None
    assert corpus.build("v", **settings | {"split": "100,0,0"}).valid_of(every) is None


def test_pairs_that_are_too_long_are_counted(corpus: Corpus) -> None:
    """What data.too_long: drop takes away is said, not found out by a loss that is off."""
    fits = {name: sum(len(a) + len(b) <= 6 for a, b in corpus.pairs[name]) for name in "pq"}
    data = corpus.build("pq", kind="pairs", sequence_length=6, too_long="drop", split="100,0,0")
    assert [(share.examples, share.too_long) for share in data.shares] == [
        (fits["p"], 40 - fits["p"]),
        (fits["q"], 10 - fits["q"]),
    ]
    dropped = f"dropped, longer than data.sequence_length: {40 - fits['p']} of 40 documents"
    assert dropped in describe_order(data.shares)
    whole = corpus.build("pq", kind="pairs", sequence_length=16, split="100,0,0")
    assert "dropped" not in describe_order(whole.shares)


def test_the_order_is_written_into_the_run_folder(corpus: Corpus, tmp_path: Path) -> None:
    data = corpus.build("pq", kind="pairs", sequence_length=16, split="100,0,0")
    write_order(tmp_path, [Order(1, 0, data.fingerprint, data.shares)])
    (values,) = json.loads((tmp_path / "data_order.json").read_text())["phases"]
    assert values["fingerprint"] == data.fingerprint
    assert [(d["examples"], d["used"], d["epochs"]) for d in values["datasets"]] == [
        (40, 40, 1.0),
        (10, 10, 1.0),
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_long_build_outlasts_the_time_limit_of_collectives(tmp_path: Path) -> None:
    """The other rank waits for 6 seconds where a collective fails after 3; it hears of an error, too."""
    result = run_forked("tests/support/slow_build.py", str(tmp_path), ranks=2)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split("\n")) == [
        "",
        "rank 0: built, then: too little",
        "rank 1: built, then: too little",
    ]


def test_a_killed_build_leaves_no_cache_and_a_whole_one_is_only_loaded(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"

    def fail(writing: Path) -> None:
        (writing / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(folder, fail, Ranks())
    assert list(tmp_path.iterdir()) == []
    build_once(folder, lambda writing: (writing / "whole").write_text("x"), Ranks())
    build_once(folder, fail, Ranks())
    assert [path.name for path in folder.iterdir()] == ["whole"]

    first = corpus.build("pq", kind="pairs", sequence_length=16, split="75,25,0", weights=[1.0, 3.0])
    from megatron.core.datasets import helpers

    monkeypatch.setattr(np, "save", None)
    monkeypatch.setattr(helpers, "build_blending_indices", None)
    again = corpus.build("pq", kind="pairs", sequence_length=16, split="75,25,0", weights=[1.0, 3.0])
    assert all((first.train[i]["tokens"] == again.train[i]["tokens"]).all() for i in range(len(first.train)))


@pytest.mark.distributed
@pytest.mark.parametrize(("disk", "builds"), [("own", [1, 1]), ("shared", [1, 0])])
def test_one_rank_a_node_builds_the_cache(corpus: Corpus, disk: str, builds: list[int]) -> None:
    """Rank 0 alone on a shared file system, one rank a node on local disks; all see equal examples."""
    shutil.rmtree(corpus.folder / "shared_cache", ignore_errors=True)
    result = run_forked("tests/support/load_examples.py", str(corpus.folder), disk, ranks=2)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"rank (\d): (\d) builds, examples (\w+)", result.stdout)
    assert [int(count) for _, count, _ in sorted(found)] == builds
    assert len({examples for _, _, examples in found}) == 1


def test_an_index_that_is_a_pickle_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    """megatron-core would run the command in it."""
    made = tmp_path / "made"
    for prefix, kind in (("t", "packed"), ("p", "pairs")):
        shutil.rmtree(corpus.folder / "cache", ignore_errors=True)
        corpus.build(prefix, kind=kind, sequence_length=16)
        for index in sorted((corpus.folder / "cache").rglob("*.npy")):
            before = index.read_bytes()
            index.write_bytes(pickle.dumps(Command(made)))
            with pytest.raises(UserError, match=rf"{index.name} is not an array"):
                corpus.build(prefix, kind=kind, sequence_length=16)
            assert not made.exists()
            index.write_bytes(before)
