"""Preprocessing: the tokens of one-by-one encoding, whatever the format, the workers and the shards."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from corpora import TEXT, digests, make_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from programs import run_here
from test_indexed import build_with_megatron

from pipeline.cli import UserError
from pipeline.data.facts import read_facts
from pipeline.data.indexed import read_index, read_sequence, token_dtype
from pipeline.data.records import Keys
from pipeline.data.tokenizer import Tokenizer, train_tokenizer
from tools import inspect_data, merge_datasets, preprocess_data

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


def command(corpus: Path, prefix: Path, *more: str, inputs: Sequence[Path | str] = ()) -> list[str]:
    """Return a command line of the tool; text of x.jsonl by one worker unless `more` says otherwise."""
    given = [str(path) for path in inputs or [corpus / "x.jsonl"]]
    return [
        "--input", *given, "--tokenizer", str(corpus / "tokenizer"), "--output-prefix", str(prefix),
        "--workers", "1", *more,
    ]  # fmt: skip


AS_PAIRS = ("--prompt-key", "q", "--answer-key", "a")


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
    inputs = [corpus / "x.jsonl", corpus / "y.txt", corpus / "x.jsonl"]
    expected = None
    for workers, shards in ((1, 1), (2, 1), (4, 1), (1, 3), (2, 3)):
        prefix = tmp_path / f"w{workers}s{shards}"
        for shard in range(shards):
            if shards > 1 and workers == 2:
                monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(shard + 5))
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


def as_table(lines: Path) -> pa.Table:
    """Return the rows of a jsonl file."""
    return pa.Table.from_pylist([json.loads(line) for line in lines.read_text().splitlines()])


def write_arrow(table: pa.Table, path: Path, new: Callable[..., pa.ipc.RecordBatchWriter]) -> None:
    """Write an IPC file or stream in batches of 20 rows."""
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=20)


def write_format(name: str, source: Path, folder: Path) -> list[str]:
    """Write x.jsonl in another format; return the arguments that read it."""
    content, folder = source.read_bytes(), folder / name
    folder.mkdir()
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}
    if name in compress:
        half = content.index(b"\n", len(content) // 2) + 1
        path = folder / f"x.jsonl.{name}"  # two members one behind the other, as cat makes them
        path.write_bytes(compress[name](content[:half]) + compress[name](content[half:]))
        return [str(path)]
    if name == "parquet":
        pq.write_table(as_table(source), folder / "x.parquet", row_group_size=15)
    elif name == "arrow_file":
        write_arrow(as_table(source), folder / "x.arrow", pa.ipc.new_file)
    elif name == "arrow_stream":
        write_arrow(as_table(source), folder / "x.arrow", pa.ipc.new_stream)
    elif name == "saved_dataset":
        import datasets

        datasets.Dataset(as_table(source)).save_to_disk(folder / "saved", num_shards=3)
        return [str(folder / "saved")]
    elif name in ("folder", "glob", "list"):
        lines = content.splitlines(keepends=True)
        for number in range(3):
            (folder / f"{number}.jsonl").write_bytes(b"".join(lines[number * 40 : number * 40 + 40]))
        (folder / "README.md").write_text("not a part of the corpus")
        (folder / "list").write_text("".join(f"{folder}/{number}.jsonl\n\n" for number in range(3)))
        return [{"folder": str(folder), "glob": f"{folder}/[0-9]*.jsonl", "list": f"@{folder}/list"}[name]]
    elif name == "crlf":
        (folder / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\r\n"))
    return [str(path) for path in sorted(folder.iterdir())]


FORMATS = (
    "gz", "bz2", "xz", "zst", "parquet", "arrow_file", "arrow_stream", "saved_dataset", "folder", "glob",
    "list", "crlf",
)  # fmt: skip


def test_every_format_gives_the_same_tokens(corpus: Path, tmp_path: Path) -> None:
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "plain", PAIRS)
    for name in FORMATS:
        inputs = write_format(name, corpus / "x.jsonl", tmp_path)
        facts = make_dataset(inputs, corpus / "tokenizer", tmp_path / f"d_{name}", PAIRS, 700)
        assert digests(tmp_path / f"d_{name}")[:2] == digests(tmp_path / "plain")[:2], name
        assert facts.counts.records - facts.counts.blank == 97


def test_a_streamed_dataset_gives_the_same_tokens(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name of a local folder of data files; one unit a file."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    write_format("folder", corpus / "x.jsonl", tmp_path)
    (tmp_path / "folder/list").unlink()
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "plain")
    arguments = command(corpus, tmp_path / "d")
    arguments[:2] = ["--hub-dataset", str(tmp_path / "folder")]
    outcome = run_here(preprocess_data.main, arguments, capsys)
    assert outcome.code == 0, outcome.error
    assert digests(tmp_path / "d")[:2] == digests(tmp_path / "plain")[:2]
    arguments[1] = str(tmp_path / "nowhere")
    complaint = run_here(preprocess_data.main, arguments, capsys).complaint()
    assert "nowhere cannot be loaded" in complaint


STRANGE = [
    "\u0000", "\ufeff", "e\u0301 \u00e9", "\u202e right to left", "\U0001f468\u200d\U0001f469", " \t ", "\r",
    "\u2028\u2029\x85\x0b", "\U0010ffff", "<mask></s><pad><unk>", "\ud7ff\ue000\ufffd", "ﷺ" * 50,
]  # fmt: skip


def test_unicode_comes_back(corpus: Path, tmp_path: Path) -> None:
    """Whatever the characters, decoding gives each document back; in tables and in lines."""
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    with (tmp_path / "x.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"text": text}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(STRANGE)
        )
    pq.write_table(pa.table({"text": STRANGE}), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        facts = make_dataset([tmp_path / name], corpus / "tokenizer", tmp_path / name.replace(".", "_"))
        index = read_index(tmp_path / name.replace(".", "_"))
        assert facts.documents == len(STRANGE)
        for number, text in enumerate(STRANGE):
            ids = read_sequence(tmp_path / name.replace(".", "_"), index, number)
            assert tokenizer.decode(ids) == text
            assert not set(ids.tolist()) & {tokenizer.mask, tokenizer.pad, tokenizer.eos}


TREE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
LINE = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode()),
    TREE.map(lambda tree: json.dumps(tree).encode()),
    st.sampled_from(
        [b"", b" \t", b"\r", b'{"text": "\\ud800"}', b'{"text": "%s"}' % (b"x" * 200), b"\xef\xbb\xbf"]
    ),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, max_size=30), unit_bytes=st.integers(1, 400), append_eos=st.booleans())
def test_fuzzed_lines_never_crash_and_are_all_accounted_for(
    corpus: Path, tmp_path: Path, lines: list[bytes], unit_bytes: int, append_eos: bool
) -> None:
    """Each line is written, quarantined or blank, by an oracle of json and str alone."""
    shutil.rmtree(tmp_path / "d.parts", ignore_errors=True)
    content = b"\n".join([b'{"text": "one that is good"}', *lines, b""])
    (tmp_path / "x.jsonl").write_bytes(content)
    facts = make_dataset(
        [tmp_path / "x.jsonl"], corpus / "tokenizer", tmp_path / "d", TEXT, unit_bytes,
        max_document_bytes=120, append_eos=append_eos,
    )  # fmt: skip
    good, bad, blank = 0, 0, 0
    for line in content.split(b"\n")[:-1]:
        if not line.strip():
            blank += 1
        elif is_good(line):
            good += 1
        else:
            bad += 1
    assert (facts.counts.documents, facts.counts.bad, facts.counts.blank) == (good, bad, blank)
    assert facts.counts.records == good + bad + blank
    quarantine = tmp_path / "d.quarantine.jsonl"
    entries = (
        [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
    )
    starts = np.cumsum([0, *(len(line) + 1 for line in content.split(b"\n"))]).tolist()
    expected = [
        a
        for a, line in zip(starts, content.split(b"\n")[:-1], strict=False)
        if line.strip() and not is_good(line)
    ]
    assert [entry["byte"] for entry in entries] == expected


def is_good(line: bytes) -> bool:
    """Whether a line is an object with a text, by Python's own json."""
    if len(line.rstrip(b"\r")) > 120:
        return False
    try:
        tree = json.loads(line.decode(), parse_constant=lambda name: 1 / 0)
        tree["text"].encode()
        json.dumps(tree, ensure_ascii=False).encode()
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return False
    return len(tree["text"]) > 0


def test_bad_lines_are_put_aside_with_their_place(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every reason; the documents are those of the good lines alone."""
    good = (corpus / "x.jsonl").read_bytes()
    bad = [b'{"q": "x", "a": \n', b'{"q": "x"}\n', b'{"q": 1, "a": "y"}\n', b'{"q": "\xff", "a": "y"}\n',
           b'{"q": "x", "a": ""}\n', b'{"q": "x", "a": "' + b"y" * 5000 + b'"}\n', b"[]\n"]  # fmt: skip
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(bad) + b"\n" + good)
    damaged = tmp_path / "y.jsonl.gz"
    damaged.write_bytes(gzip.compress(good)[:-20])
    more = ("--max-document-bytes", "4000", "--max-bad-fraction", "0.5", *AS_PAIRS)
    outcome = run_here(
        preprocess_data.main, command(corpus, tmp_path / "d", *more, inputs=[path, damaged]), capsys
    )
    assert outcome.code == 0, outcome.error
    counts = read_facts(tmp_path / "d").counts
    assert counts.quarantined == {
        "damaged_file": 1, "empty_answer": 1, "invalid_json": 1, "invalid_utf8": 1, "missing_key": 1,
        "too_long": 1, "wrong_type": 2,
    }  # fmt: skip
    assert counts.blank == 1
    assert counts.records == counts.documents + 8 + 1
    assert counts.documents >= 97
    entries = [json.loads(line) for line in (tmp_path / "d.quarantine.jsonl").read_text().splitlines()]
    starts = np.cumsum([0, *map(len, bad[:-1])]).tolist()
    assert [(e["file"], e["byte"]) for e in entries[:-1]] == [(str(path), start) for start in starts]
    assert (entries[-1]["file"], entries[-1]["reason"]) == (str(damaged), "damaged_file")
    assert "8 quarantined" in outcome.output
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "good", PAIRS)
    ours, theirs = (IndexedDataset(str(tmp_path / name), multimodal=True) for name in ("d", "good"))
    assert all((ours[i][0] == theirs[i][0]).all() for i in range(len(theirs)))


def test_a_run_stops_at_the_first_bad_line_or_at_too_many(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And keeps the older dataset; when the limits are raised it goes on."""
    prefix = tmp_path / "d"
    assert run_here(preprocess_data.main, command(corpus, prefix, *AS_PAIRS), capsys).code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes((corpus / "x.jsonl").read_bytes() + b'{"q": "x", "a": ""}\n{"q": "x"}\n')
    arguments = command(corpus, prefix, *AS_PAIRS, inputs=[bad])
    assert "give --overwrite" in run_here(preprocess_data.main, arguments, capsys).complaint()
    arguments.append("--overwrite")
    complaint = run_here(preprocess_data.main, [*arguments, "--on-error", "fail"], capsys).complaint()
    assert "bad.jsonl, line 98: an answer of length 0" in complaint
    complaint = run_here(preprocess_data.main, arguments, capsys).complaint()
    assert "2 of 99 records are bad, more than --max-bad-fraction 0.01" in complaint
    assert f"{bad}, byte {(corpus / 'x.jsonl').stat().st_size}: an answer of length 0" in complaint
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    outcome = run_here(preprocess_data.main, [*arguments, "--max-bad-fraction", "0.03"], capsys)
    assert outcome.code == 0
    assert read_facts(prefix).counts.bad == 2


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


def test_duplicates_are_found_in_partitions(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data import merge

    make_dataset(
        [corpus / "x.jsonl"] * 2, corpus / "tokenizer", tmp_path / "one", PAIRS, 999, deduplicate=True
    )
    monkeypatch.setattr(merge, "HASHES_AT_ONCE", 20)
    make_dataset(
        [corpus / "x.jsonl"] * 2, corpus / "tokenizer", tmp_path / "two", PAIRS, 500, deduplicate=True
    )
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert read_facts(tmp_path / "one").counts.duplicates >= 97


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

    assert "empty.jsonl: no document in it" in complaint(inputs=[empty])
    shutil.rmtree(tmp_path / "d.parts")
    assert "broken.parquet is no whole parquet file" in complaint(inputs=[tmp_path / "broken.parquet"])
    assert "nothing: no file of a known kind" in complaint(inputs=[tmp_path / "nothing"])
    assert "no file matches" in complaint(inputs=[f"{tmp_path}/*.nothing"])
    assert "the list" in complaint(inputs=[f"@{tmp_path}/list"])
    for more, message in [
        (("--workers", "0"), "--workers is 0"),
        (("--unit-bytes", "0"), "--unit-bytes is 0"),
        (("--num-shards", "2", "--shard-index", "2"), "--shard-index is 2"),
        (("--max-bad-fraction", "2"), "--max-bad-fraction is 2.0"),
        (("--messages-key", "m", "--text-key", "t"), "--text-key excludes --messages-key"),
        (("--messages-key", "m", "--message-format", "x"), "it must hold {content}"),
        (("--split-documents", "line", *AS_PAIRS), "--split-documents cuts texts"),
    ]:
        assert message in complaint(*more)
    assert (
        "no corpus" in run_here(preprocess_data.main, command(corpus, tmp_path / "d")[2:], capsys).complaint()
    )
    assert not (tmp_path / "d.parts").exists()


def test_damaged_datasets_are_named(corpus: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "d"
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", prefix, PAIRS)
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
        "nats a token",
        "d: 0 faults",
        "append_eos",
    ):
        assert part in outcome.output
    assert "\033[" not in outcome.output
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
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
