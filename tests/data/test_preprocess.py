"""Preprocessing: the bytes of megatron-core's own builder, for any number of workers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from programs import run_here

from pipeline.cli import UserError
from pipeline.data import preprocess as module
from pipeline.data.indexed import Part, join, read_index, token_dtype
from pipeline.data.preprocess import preprocess, read_facts
from pipeline.data.records import Keys
from pipeline.data.tokenizer import Tokenizer, train_tokenizer
from tools import inspect_data, preprocess_data

PAIRS = Keys(("q", "a"))
QUESTIONS = [
    (f"what is {n} + {n}?" if n % 5 else "", f"{2 * n}\n\u2028 é 🎉"[: 2 + n % 7]) for n in range(97)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with x.jsonl (97 pairs, some prompts empty), y.txt and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "x.jsonl").open("w") as file:
        file.writelines(json.dumps({"q": q, "a": a, "text": q + a}) + "\n" for q, a in QUESTIONS)
    (folder / "y.txt").write_text("to be\nor not\n\nto be\n")
    train_tokenizer([q + a for q, a in QUESTIONS], 300, "bpe", folder / "tokenizer")
    return folder


def build_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: np.dtype, pairs: bool) -> None:
    """Write a dataset by megatron-core's own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type, multimodal=pairs)
    for document in documents:
        for mode, sequence in enumerate(document):
            builder.add_item(torch.tensor(sequence, dtype=torch.int64), mode if pairs else 0)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_join_writes_megatrons_bytes(tmp_path: Path, pairs: bool, vocab_size: int) -> None:
    """uint16 and int32, with modes and without, from parts of any size, empty ones included."""
    dtype = token_dtype(vocab_size)
    assert dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
    random = np.random.default_rng(0)
    lengths = [0, 5, 3, 1, 0, 9] if pairs else [4, 1, 7]
    sequences = [random.integers(0, vocab_size, n).tolist() for n in lengths]
    per_document = 2 if pairs else 1
    documents = [sequences[i : i + per_document] for i in range(0, len(sequences), per_document)]
    build_with_megatron(tmp_path / "theirs", documents, dtype, pairs)
    parts = []
    for number, document in enumerate([[], *documents]):
        path = tmp_path / f"part{number}"
        path.write_bytes(b"".join(np.array(s, dtype).tobytes() for s in document))
        parts.append(Part(path, np.array([len(s) for s in document], np.int32)))
    join(parts, tmp_path / "ours", dtype, pairs)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    facts = read_index(tmp_path / "ours")
    assert (facts.documents, facts.sequences, facts.tokens) == (3, len(lengths), sum(lengths))
    assert facts.lengths.tolist() == lengths
    assert facts.has_modes == pairs


@pytest.mark.parametrize("append_eos", [True, False])
def test_pairs_equal_one_by_one_encoding(
    corpus: Path, tmp_path: Path, append_eos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences a document, modes 0 and 1; json and SentencePiece alone are the oracle."""
    monkeypatch.setattr(module, "UNIT_BYTES", 1000)
    facts = preprocess([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "d", PAIRS, append_eos, 2)
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    dataset = IndexedDataset(str(tmp_path / "d"), multimodal=True)
    expected = []
    for line in (corpus / "x.jsonl").read_text().splitlines():
        tree = json.loads(line)
        answer = tokenizer.processor.encode(tree["a"]) + ([tokenizer.eos] if append_eos else [])
        expected.append([tokenizer.processor.encode(tree["q"]), answer])
    assert len(dataset) == 2 * len(expected)
    for number, document in enumerate(expected):
        for mode, ids in enumerate(document):
            sequence, found = dataset.get(2 * number + mode)
            assert sequence.tolist() == ids
            assert found == mode
    assert dataset.document_indices.tolist() == list(range(0, 2 * len(expected) + 1, 2))
    assert facts == read_facts(tmp_path / "d")
    assert facts.documents == 97
    assert facts.tokens == sum(len(ids) for document in expected for ids in document)
    assert facts.longest_document == max(len(q) + len(a) for q, a in expected)
    build_with_megatron(tmp_path / "theirs", expected, token_dtype(facts.vocab_size), True)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"d{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", 500)
    inputs = [corpus / "x.jsonl", corpus / "y.txt", corpus / "x.jsonl"]
    digests = []
    for workers in (1, 2, 3):
        prefix = tmp_path / f"w{workers}"
        preprocess(inputs, corpus / "tokenizer", prefix, Keys(("text",)), True, workers)
        files = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1] == digests[2]
    assert read_facts(tmp_path / "w1").documents == 97 + 2 + 97
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"w{w}{s}" for w in (1, 2, 3) for s in (".bin", ".idx", ".json")}


def arguments(corpus: Path, prefix: Path, source: Path | None = None) -> list[str]:
    """Return a command line of the tool for the pairs."""
    return [
        "--input", str(source or corpus / "x.jsonl"), "--tokenizer", str(corpus / "tokenizer"),
        "--output-prefix", str(prefix), "--workers", "1", "--prompt-key", "q", "--answer-key", "a",
    ]  # fmt: skip


def test_a_bad_line_stops_the_run_and_keeps_the_old_dataset(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "d"
    assert run_here(preprocess_data.main, arguments(corpus, prefix), capsys).code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "exists" in run_here(preprocess_data.main, arguments(corpus, prefix), capsys).complaint()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"q": "x", "a": "y"}\n{"q": "x", "a": ""}\n')
    command = [*arguments(corpus, prefix, bad), "--overwrite"]
    complaint = run_here(preprocess_data.main, command, capsys).complaint()
    assert "bad.jsonl, line 2 has an answer of length 0" in complaint
    bad.unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_empty_corpus_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    complaint = run_here(preprocess_data.main, arguments(corpus, tmp_path / "d", empty), capsys).complaint()
    assert "empty.jsonl: no document in it" in complaint
    complaint = run_here(preprocess_data.main, [*arguments(corpus, tmp_path / "d"), "--workers", "0"], capsys)
    assert "--workers is 0" in complaint.complaint()


def test_damaged_datasets_are_named(corpus: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "d"
    with pytest.raises(UserError, match=r"d.bin does not exist; make it with tools/preprocess_data.py"):
        read_facts(prefix)
    preprocess([corpus / "x.jsonl"], corpus / "tokenizer", prefix, PAIRS, False, 1)
    content = {s: Path(f"{prefix}{s}").read_bytes() for s in (".bin", ".idx", ".json")}
    for suffix, damaged, message in [
        (".bin", content[".bin"][:-2], r"d.bin has not the size"),
        (".idx", content[".idx"][:-2], r"d.idx is cut short"),
        (".idx", b"MMIDIDX", r"d.idx is no index"),
        (".json", b"{}", r"d.json is damaged"),
        (
            ".json",
            content[".json"].replace(b'"documents": 97', b'"documents": 98'),
            r"do not belong together",
        ),
    ]:
        Path(f"{prefix}{suffix}").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            read_facts(prefix)
        Path(f"{prefix}{suffix}").write_bytes(content[suffix])
    assert read_facts(prefix).documents == 97


def test_inspect_shows_prompt_and_answer(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "d", PAIRS, True, 1)
    outcome = run_here(inspect_data.main, [str(tmp_path / "d"), "--samples", "2"], capsys)
    assert outcome.code == 0
    assert "97 documents" in outcome.output
    assert "'what is 1 + 1?'" in outcome.output
    assert "[1] answer" in outcome.output
    assert "nowhere" in run_here(inspect_data.main, [str(tmp_path / "nowhere")], capsys).complaint()
