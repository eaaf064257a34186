"""What is read: every format gives the same tokens, any characters come back, bad lines are put aside."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pipeline.base.errors import EXIT_LOST_DATA, UserError
from pipeline.corpus.records import Keys, read_all
from pipeline.data.facts import read_facts
from pipeline.data.indexed import read_index, read_sequence
from pipeline.data.tokenizer import Tokenizer
from support.corpora import AS_PAIRS, PAIRS, TEXT, command, digests, make_dataset
from support.programs import run_here
from tools import preprocess_data

pytestmark = pytest.mark.slow


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


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Either of the two would be lost without a word."""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], ["text", "text", "n"])
    pq.write_table(table, tmp_path / "x.parquet")
    write_arrow(table, tmp_path / "x.arrow", pa.ipc.new_file)
    for path in (tmp_path / "x.parquet", tmp_path / "x.arrow"):
        with pytest.raises(UserError, match="has 2 columns 'text': rename or drop one"):
            list(read_all([path], Keys(("text",))))


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


def test_a_streamed_dataset_without_the_package_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    arguments = command(corpus, tmp_path / "d")
    arguments[:2] = ["--hub-dataset", "a/b"]
    complaint = run_here(preprocess_data.main, arguments, capsys).complaint()
    assert complaint.startswith("error: --hub-dataset needs datasets, ")
    assert "'puma-pipeline[hub]'" in complaint


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
    good, bad, blank, empty = 0, 0, 0, 0
    for line in content.split(b"\n")[:-1]:
        if not line.strip():
            blank += 1
        elif is_empty(line):
            empty += 1
        elif is_good(line):
            good += 1
        else:
            bad += 1
    counts = facts.counts
    assert (counts.documents, counts.bad, counts.blank, counts.empty) == (good, bad, blank, empty)
    assert counts.records == good + bad + blank + empty
    quarantine = tmp_path / "d.quarantine.jsonl"
    entries = (
        [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
    )
    starts = np.cumsum([0, *(len(line) + 1 for line in content.split(b"\n"))]).tolist()
    expected = [
        a
        for a, line in zip(starts, content.split(b"\n")[:-1], strict=False)
        if line.strip() and not is_good(line) and not is_empty(line)
    ]
    assert [entry["byte"] for entry in entries] == expected


def text_of(line: bytes) -> str | None:
    """Return the text of a line that is an object, by Python's own json; None if it is none."""
    if len(line.rstrip(b"\r")) > 120:
        return None
    try:
        tree = json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: 1 / 0)
        tree["text"].encode()
        json.dumps(tree, ensure_ascii=False).encode()
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return tree["text"]


def is_good(line: bytes) -> bool:
    return bool(text_of(line))


def is_empty(line: bytes) -> bool:
    return text_of(line) == ""


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
    assert outcome.code == EXIT_LOST_DATA, outcome.error
    counts = read_facts(tmp_path / "d").counts
    assert counts.lost_bytes == damaged.stat().st_size
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
    """And keeps the older dataset; with higher limits it resumes."""
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
