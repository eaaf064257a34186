"""Preprocessing: the tokens of one-by-one encoding, whatever the workers and the shards; what is left out."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.context
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pipeline.base.errors import UserError
from pipeline.corpus import pool
from pipeline.corpus.records import Keys
from pipeline.corpus.tokenizer_making import train_tokenizer
from pipeline.data.facts import read_facts
from pipeline.data.indexed import read_index, read_sequence, token_dtype
from pipeline.data.tokenizer import Tokenizer
from support.corpora import (
    AS_PAIRS,
    PAIRS,
    TEXT,
    build_with_megatron,
    command,
    digests,
    make_dataset,
    make_parts,
    partition_of,
)
from support.programs import Outcome, run_here
from tools import inspect_data, merge_datasets, preprocess_data

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("append_eos", [True, False])
def test_pairs_equal_one_by_one_encoding(corpus: Path, tmp_path: Path, append_eos: bool) -> None:
    """Two sequences a document, modes 0 and 1; json and SentencePiece alone are the oracle."""
    facts = make_dataset(
        [corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "d", PAIRS, 1000, append_eos=append_eos
    )
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    dataset = IndexedDataset(str(tmp_path / "d"), multimodal=True)
    expected = []
    for line in (corpus / "x.jsonl").read_text().splitlines():
        tree = json.loads(line)
        prompt, answer = (tokenizer.model.processor.encode(tree[key]) for key in "qa")
        expected.append([prompt, answer + ([tokenizer.eos] if append_eos else [])])
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
    lengths = np.array([len(q) + len(a) for q, a in expected])
    assert facts.longest_document == lengths.max()
    for bound, count in facts.length_histogram.items():
        assert count == ((lengths <= int(bound)) & (lengths > int(bound) // 2)).sum()
    assert sum(facts.length_histogram.values()) == 97
    for mode, histogram in enumerate((facts.prompt_histogram, facts.token_histogram)):
        ids = np.concatenate([document[mode] for document in expected]).astype(np.int64)
        assert histogram == np.bincount(ids, minlength=facts.vocab_size).tolist()
    build_with_megatron(tmp_path / "theirs", expected, token_dtype(facts.vocab_size), True)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"d{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_workers_and_shards_write_the_same_bytes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, 2 and 4 workers, 1 and 3 shards, any size of units, and SLURM's array tasks."""
    inputs = [corpus / "x.jsonl", corpus / "y.txt", tmp_path / "again.jsonl"]
    shutil.copy(corpus / "x.jsonl", inputs[2])
    expected = None
    for workers, shards in ((1, 1), (2, 1), (4, 1), (1, 3), (2, 3)):
        prefix = tmp_path / f"w{workers}s{shards}"
        for shard in range(shards):
            if shards > 1 and workers == 2:
                monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(5 + 2 * shard))  # --array=5-9:2
                monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")
                monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
                monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
                share: tuple[str, ...] = ()
            else:
                share = ("--shard-index", str(shard), "--num-shards", str(shards))
            size = ("--unit-bytes", str(400 + 300 * workers), "--workers", str(workers), "--append-eos")
            arguments = command(corpus, prefix, *size, *share, inputs=inputs)
            outcome = run_here(preprocess_data.main, arguments, capsys)
            assert outcome.code == 0, outcome.error
        if shards > 1:
            assert not prefix.with_suffix(".idx").exists()
            arguments = ["--parts", f"{prefix}.parts", "--output-prefix", str(prefix)]
            assert run_here(merge_datasets.main, arguments, capsys).code == 0
        else:
            left = {path.name for path in tmp_path.iterdir() if path.name.startswith(prefix.name)}
            assert left == {f"{prefix.name}{s}" for s in (".bin", ".idx", ".json", ".summary.json")}
        expected = expected or digests(prefix)
        assert digests(prefix) == expected
    assert read_facts(tmp_path / "w1s1").documents == 97 + 2 + 97


@pytest.mark.parametrize("shards", [1, 2])
def test_filters_and_duplicates(corpus: Path, tmp_path: Path, shards: int) -> None:
    """The first of equal documents stays, wherever the units are cut; a set of texts is the oracle."""
    random = np.random.default_rng(1)
    texts = ["ab" * int(n) for n in random.integers(1, 30, 400)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    fits = [text for text in texts if 5 <= len(tokenizer.encode(text)) + 1 <= 20]
    options = {"append_eos": True, "min_tokens": 5, "max_tokens": 20, "deduplicate": True}
    facts = make_dataset([path], corpus / "tokenizer", tmp_path / "d", TEXT, 300 * shards, **options)
    index = read_index(tmp_path / "d")
    found = [tokenizer.decode(read_sequence(tmp_path / "d", index, i)) for i in range(index.documents)]
    assert found == list(dict.fromkeys(fits))
    assert sum(facts.counts.filtered.values()) == len(texts) - len(fits)
    assert set(facts.counts.filtered) == {"min_tokens", "max_tokens"}
    assert facts.counts.duplicates == len(fits) - len(set(fits))
    facts.counts.check()
    ids = np.concatenate([read_sequence(tmp_path / "d", index, i) for i in range(index.documents)])
    assert facts.token_histogram == np.bincount(ids, minlength=facts.vocab_size).tolist()
    assert sum(facts.length_histogram.values()) == index.documents


def test_duplicates_are_found_in_buckets(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.corpus import merge

    twice = tmp_path / "twice.jsonl"
    twice.write_bytes((corpus / "x.jsonl").read_bytes() * 2)
    make_dataset([twice], corpus / "tokenizer", tmp_path / "one", PAIRS, 999, deduplicate=True)
    monkeypatch.setattr(merge, "HASHES_AT_ONCE", 20)
    make_dataset([twice], corpus / "tokenizer", tmp_path / "two", PAIRS, 500, deduplicate=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert read_facts(tmp_path / "one").counts.duplicates >= 97


def test_a_shard_without_a_document_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what it was to be made from; training would fail on it much later."""
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n" * 1700)
    partition = partition_of([corpus / "x.jsonl", blank], corpus / "tokenizer", PAIRS, 900)
    folder = make_parts(partition, tmp_path / "d")
    count = len(partition.units)
    arguments = ["--parts", str(folder), "--output-prefix", str(tmp_path / "d"), "--shards"]
    complaint = run_here(merge_datasets.main, [*arguments, str(count)], capsys).complaint()
    assert f"--input {blank}: no document in it" in complaint
    assert f"for d-{count - 1:05d}-of-{count:05d}: give fewer --shards" in complaint
    assert not list(tmp_path.glob(f"*d-{count - 1:05d}*"))
    assert run_here(merge_datasets.main, [*arguments, str(count // 2)], capsys).code == 0


def test_workers_of_tables_are_spawned(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork would meet the threads that pyarrow has in the parent; forks start at once."""
    table = pa.Table.from_pylist([json.loads(line) for line in (corpus / "x.jsonl").open()])
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=30)
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    methods: list[str] = []
    get_context = multiprocessing.get_context

    def recorded(method: str) -> multiprocessing.context.BaseContext:
        methods.append(method)
        return get_context(method)

    monkeypatch.setattr(pool.multiprocessing, "get_context", recorded)
    for name, method in (("x.parquet", "spawn"), ("x.arrow", "spawn"), ("x.jsonl", "fork")):
        inputs = [corpus / "x.jsonl"] if name == "x.jsonl" else [corpus / "y.txt", tmp_path / name]
        arguments = command(corpus, tmp_path / f"d_{name}", "--workers", "2", inputs=inputs)
        outcome = run_here(preprocess_data.main, [*arguments, "--unit-bytes", "900"], capsys)
        assert outcome.code == 0, outcome.error
        assert methods.pop() == method
        assert read_facts(tmp_path / f"d_{name}").documents == 97 + (2 if method == "spawn" else 0)


def test_shuffling_is_a_permutation_that_the_cut_does_not_change(corpus: Path, tmp_path: Path) -> None:
    def built(name: str, unit_bytes: int, keys: Keys, **options: object) -> list[tuple[int, ...]]:
        make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / name, keys, unit_bytes, **options)
        index, step = read_index(tmp_path / name), 2 if keys.is_pair else 1
        sequences = [tuple(read_sequence(tmp_path / name, index, i)) for i in range(index.sequences)]
        return [sum(sequences[i : i + step], ()) for i in range(0, len(sequences), step)]

    for keys in (PAIRS, TEXT):
        kind = "p" if keys.is_pair else "t"
        plain = built(f"{kind}0", 400, keys)
        shuffled = built(f"{kind}1", 400, keys, shuffle_seed=1)
        assert sorted(shuffled) == sorted(plain)
        assert sum(a == b for a, b in zip(plain, shuffled, strict=True)) < 30
        assert built(f"{kind}2", 5000, keys, shuffle_seed=1) == shuffled
        assert built(f"{kind}3", 400, keys, shuffle_seed=2) != shuffled


def test_merging_and_blends(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts as a blend of shards, joined again, are the one dataset; mixed tokenizers are refused."""
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "d", PAIRS, 700)
    base = ["--parts", f"{tmp_path}/d.parts", "--output-prefix", str(tmp_path / "s"), "--shards"]
    outcome = run_here(merge_datasets.main, [*base, "3"], capsys)
    shards = [f"{tmp_path}/s-{number:05d}-of-00003" for number in range(3)]
    assert f'--data.prefixes "[{",".join(shards)}]"' in outcome.output
    assert "--shards is 99" in run_here(merge_datasets.main, [*base, "99"], capsys).complaint()
    arguments = ["--datasets", *shards, "--output-prefix", str(tmp_path / "joined")]
    assert run_here(merge_datasets.main, arguments, capsys).code == 0
    assert digests(tmp_path / "joined")[:2] == digests(tmp_path / "d")[:2]
    joined, whole = read_facts(tmp_path / "joined"), read_facts(tmp_path / "d")
    for name in ("counts", "token_histogram", "prompt_histogram", "length_histogram", "longest_document"):
        assert getattr(joined, name) == getattr(whole, name)
    assert "give --overwrite" in run_here(merge_datasets.main, arguments, capsys).complaint()
    again = f"{tmp_path}/../{tmp_path.name}/s-00000-of-00003"
    arguments = ["--datasets", *shards, "--output-prefix", again, "--overwrite"]
    assert "is one of the datasets to merge" in run_here(merge_datasets.main, arguments, capsys).complaint()
    arguments = ["--datasets", *shards, again, "--output-prefix", str(tmp_path / "twice")]
    assert f"{again} is given twice" in run_here(merge_datasets.main, arguments, capsys).complaint()
    train_tokenizer(["other words"], 280, "bpe", tmp_path / "other")
    make_dataset([corpus / "x.jsonl"], tmp_path / "other", tmp_path / "o", PAIRS)
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "t", TEXT)
    for name, message in (("o", "differ in the tokenizer"), ("t", "differ in what it holds")):
        arguments = ["--datasets", shards[0], f"{tmp_path}/{name}", "--output-prefix", f"{tmp_path}/m"]
        assert message in run_here(merge_datasets.main, arguments, capsys).complaint()
    shutil.rmtree(tmp_path / "d.parts/000001")
    complaint = run_here(merge_datasets.main, [*base, "1"], capsys).complaint()
    assert "parts are missing, unit 1 first" in complaint


def test_what_cannot_work_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "nothing").mkdir()

    def complaint(*more: str, inputs: Sequence[Path | str] = ()) -> str:
        arguments = command(corpus, tmp_path / "d", *more, inputs=inputs)
        return run_here(preprocess_data.main, arguments, capsys).complaint()

    assert "belong to --hub-dataset" in complaint("--hub-config", "en")
    assert "empty.jsonl: no document in it" in complaint(inputs=[empty])
    shutil.rmtree(tmp_path / "d.parts")
    empty.write_bytes(b"")
    assert "empty.jsonl: no document in it" in complaint(inputs=[empty])
    shutil.rmtree(tmp_path / "d.parts")
    assert "broken.parquet is not a complete parquet file" in complaint(inputs=[tmp_path / "broken.parquet"])
    assert "nothing holds no file of a known type" in complaint(inputs=[tmp_path / "nothing"])
    assert "no file matches" in complaint(inputs=[f"{tmp_path}/*.nothing"])
    assert "the list" in complaint(inputs=[f"@{tmp_path}/list"])
    for more, message in [
        (("--workers", "0"), "--workers is 0"),
        (("--unit-bytes", "0"), "--unit-bytes is 0"),
        (("--num-shards", "2", "--shard-index", "2"), "--shard-index is 2"),
        (("--max-bad-fraction", "2"), "--max-bad-fraction is 2.0"),
        (("--min-tokens", "-1"), "--min-tokens is -1: it must be 0 or more"),
        (("--max-tokens", "0"), "--max-tokens is 0: it must be 1 or more"),
        (("--min-tokens", "9", "--max-tokens", "8"), "--max-tokens is 8: it must be 9 or more"),
        (("--shuffle-seed", "-1"), "--shuffle-seed is -1: it must be 0 or more"),
        (("--messages-key", "m", "--text-key", "t"), "--text-key excludes --messages-key"),
        (("--messages-key", "m", "--message-format", "x"), "it must contain {content}"),
        (("--split-documents", "line", *AS_PAIRS), "--split-documents splits texts"),
        (("--prompt-key", "q", "--answer-key", "q"), "--prompt-key and --answer-key are both q"),
    ]:
        assert message in complaint(*more)
    assert (
        "no corpus" in run_here(preprocess_data.main, command(corpus, tmp_path / "d")[2:], capsys).complaint()
    )
    assert not (tmp_path / "d.parts").exists()


def test_a_dataset_does_not_replace_or_read_what_it_is_made_from(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PREFIX.json may be the corpus itself, or of anybody; PREFIX.quarantine.jsonl may match the inputs."""
    content = (corpus / "x.jsonl").read_bytes() + b"bad\n"
    path = tmp_path / "x.json"
    path.write_bytes(content)

    def run(prefix: str, *more: str, inputs: Sequence[Path | str]) -> Outcome:
        arguments = command(corpus, tmp_path / prefix, "--max-bad-fraction", "0.1", *more, inputs=inputs)
        return run_here(preprocess_data.main, arguments, capsys)

    assert f"{path} is a file of the dataset at" in run("x", "--overwrite", inputs=[path]).complaint()
    assert f"{path} exists: give --overwrite" in run("x", inputs=[corpus / "x.jsonl"]).complaint()
    assert f"x is in the folder --input {tmp_path}" in run("y/x", inputs=[tmp_path]).complaint()
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json"]
    assert run("x2", inputs=[path]).code == 0
    own = f"{tmp_path}/x2.quarantine.jsonl is a file of the dataset at"
    assert own in run("x2", "--overwrite", inputs=[path, f"{tmp_path}/x2.*.jsonl"]).complaint()
    (tmp_path / "x3.json").write_text("precious")
    merge = ["--datasets", str(tmp_path / "x2"), "--output-prefix", str(tmp_path / "x3")]
    assert "x3.json exists: give --overwrite" in run_here(merge_datasets.main, merge, capsys).complaint()
    (tmp_path / "x2.idx").unlink()  # as a kill leaves it between PREFIX.json and the index
    assert run("x2", inputs=[path]).code == 0


def test_damaged_datasets_are_named(corpus: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "d"
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", prefix, PAIRS)
    content = {s: Path(f"{prefix}{s}").read_bytes() for s in (".bin", ".idx", ".json")}
    for suffix, damaged, message in [
        (".bin", content[".bin"][:-2], r"d.bin does not have the size"),
        (".idx", content[".idx"][:-2], r"d.idx is truncated"),
        (".idx", b"MMIDIDX", r"d.idx is not the index"),
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


def test_inspect_shows_and_verifies(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "d"
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", prefix, PAIRS, append_eos=True)
    more = ["--samples", "2", "--verify", "--entropy", "--histogram", str(tmp_path / "h.png")]
    outcome = run_here(inspect_data.main, [str(prefix), *more], capsys)
    assert outcome.code == 0, outcome.output
    for part in (
        "97 documents",
        "'what is 1 + 1?'",
        "[1] answer",
        "nats per token",
        "d: 0 faults",
        "append_eos",
    ):
        assert part in outcome.output
    assert "\033[" not in outcome.output
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    more = ["--histogram", str(tmp_path / "h.pngs")]
    assert "h.pngs: Format 'pngs'" in run_here(inspect_data.main, [str(prefix), *more], capsys).complaint()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
        complaint = run_here(inspect_data.main, [str(prefix), *more], capsys).complaint()
        assert complaint.startswith("error: --histogram needs matplotlib, ")
        assert "'puma-pipeline[plots]'" in complaint
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[32m" in run_here(inspect_data.main, [str(prefix)], capsys).output
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[0] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    outcome = run_here(inspect_data.main, [str(prefix), "--verify"], capsys)
    assert outcome.code == 1
    assert "d.bin has sha256" in outcome.output
    assert "nowhere" in run_here(inspect_data.main, [str(tmp_path / "nowhere")], capsys).complaint()


def test_the_entropy_is_that_of_the_answers(corpus: Path, tmp_path: Path) -> None:
    facts = make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "d", PAIRS)
    dataset = IndexedDataset(str(tmp_path / "d"), multimodal=True)
    ids = np.concatenate([dataset[i][0] for i in range(1, len(dataset), 2)])
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    assert facts.entropy == pytest.approx(-(shares * np.log(shares)).sum())


def test_the_last_units_are_small(corpus: Path, tmp_path: Path) -> None:
    """Else most workers would wait for the last: a piece has an 8th of what is left, or 1 MiB."""
    sizes = [5 * 2**20, 200, 7 * 2**20]
    paths = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for path, size in zip(paths, sizes, strict=True):
        path.write_text(("x" * 99 + "\n") * (size // 100), encoding="utf-8")
    partition = partition_of(paths, corpus / "tokenizer")
    spans = [span for unit in partition.units for span in unit]
    for number, path in enumerate(paths):  # every byte once, in order
        ends = [(span.start, span.end) for span in spans if span.source == number]
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == path.stat().st_size
    left = sum(path.stat().st_size for path in paths)
    for unit in partition.units:
        size = sum(span.size for span in unit)
        assert size <= 2 * max(left / 8, 2**20) + 100  # the end of a file, a piece of the next, a line
        left -= size
    assert left == 0
