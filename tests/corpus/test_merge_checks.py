"""Merging checks its inputs; stored paths are found from any folder; arrays of tasks with their own data."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.corpus.merge import merge_datasets, merge_parts
from pipeline.corpus.parts import HASHES, LENGTHS
from pipeline.data.facts import check_same, read_facts, write_facts
from pipeline.data.indexed import HEADER, MAGIC
from pipeline.data.paths import bin_path, facts_path
from support.corpora import PAIRS, TEXT, command, make_dataset, make_parts, partition_of
from support.programs import run_here
from tools import inspect_data, preprocess_data
from tools import merge_datasets as merge_tool


@pytest.fixture
def pair(corpus: Path, tmp_path: Path) -> list[Path]:
    """Return two datasets of texts, the second with end-of-sequence tokens."""
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "a")
    make_dataset([corpus / "y.txt"], corpus / "tokenizer", tmp_path / "b", append_eos=True)
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_damaged_datasets_are_not_merged(pair: list[Path], suffix: str, tmp_path: Path) -> None:
    """A changed byte of the same size, anywhere; an older dataset stays as it was."""
    (tmp_path / "out.bin").write_bytes(b"older")
    path = Path(f"{pair[1]}{suffix}")
    content = path.read_bytes()
    for place in (len(content) // 2, len(content) - 1, 40 if suffix == ".idx" else 0):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"/b\.(bin|idx)"):
            merge_datasets(pair, tmp_path / "out", mixed_eos=True)
        assert (tmp_path / "out.bin").read_bytes() == b"older"
        assert not (tmp_path / "out.json").exists()
    path.write_bytes(content)
    facts = merge_datasets(pair, tmp_path / "out", mixed_eos=True)
    tokens = np.fromfile(bin_path(tmp_path / "out"), np.uint16)
    assert facts.token_histogram == np.bincount(tokens, minlength=facts.vocab_size).tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 10),  # of 300
        ("vocab_size", "300"),
        ("vocab_size", None),
        ("special_ids", {}),
        ("special_ids", None),
        ("options", None),
        ("kind", "pairs"),
        ("tokenizer", 5),
        ("token_histogram", [1, 2]),
        ("token_histogram", "x"),
        ("length_histogram", None),
        ("longest_document", -5),
        ("sha256", {"bin": "0"}),
    ],
)
def test_edited_facts_are_named(pair: list[Path], name: str, value: object) -> None:
    path = facts_path(pair[0])
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=r"a\.json is damaged \(.*: preprocess the corpus again"):
        read_facts(pair[0])


def test_damaged_datasets_are_inspected(pair: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """An id outside of the vocabulary, an offset outside of the file, another histogram: said, not raised."""
    facts = read_facts(pair[0])
    first_offset = len(MAGIC) + HEADER.size + 4 * facts.documents
    for suffix, place, message in (
        (".bin", 1, "is not an id of the vocabulary"),
        (".idx", first_offset + 7, "does not begin where"),
    ):
        path = Path(f"{pair[0]}{suffix}")
        content = path.read_bytes()
        changed = bytearray(content)
        changed[place] = 0xFF  # the highest byte of a number
        path.write_bytes(changed)
        outcome = run_here(inspect_data.main, [str(pair[0]), "--verify"], capsys)
        assert outcome.code == 1, outcome.error
        assert message in outcome.output
        complaint = run_here(inspect_data.main, [str(pair[0])], capsys).complaint()
        assert "sequence 0 is damaged" in complaint
        path.write_bytes(content)
    counts = facts.token_histogram
    counts[5], counts[6] = counts[6] + 1, counts[5] - 1
    write_facts(facts, pair[0])
    outcome = run_here(inspect_data.main, [str(pair[0]), "--verify"], capsys)
    assert outcome.code == 1
    assert "the token histograms are not those of the tokens" in outcome.output


@pytest.mark.parametrize("name", [LENGTHS, HASHES])
def test_damaged_parts_are_not_merged(corpus: Path, name: str, tmp_path: Path) -> None:
    partition = partition_of([corpus / "x.jsonl"], corpus / "tokenizer", PAIRS, 900, deduplicate=True)
    folder = make_parts(partition, tmp_path / "d")
    path = folder / "000001" / name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"000001/{name} is damaged"):
        merge_parts(folder, tmp_path / "d")


@pytest.mark.slow
def test_end_of_sequence_in_some_documents_is_asked_for(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a dataset is itself merged."""
    arguments = ["--datasets", *map(str, pair), "--output-prefix", str(tmp_path / "ab")]
    complaint = run_here(merge_tool.main, arguments, capsys).complaint()
    assert f"{pair[0]} was made without --append-eos and {pair[1]} with it" in complaint
    assert run_here(merge_tool.main, [*arguments, "--mixed-eos"], capsys).code == 0
    more = ["--datasets", str(tmp_path / "ab"), str(pair[1]), "--output-prefix", str(tmp_path / "abb")]
    complaint = run_here(merge_tool.main, more, capsys).complaint()
    assert f"{tmp_path}/ab was made partly with --append-eos and {pair[1]} with it" in complaint
    merge_datasets([pair[0]], tmp_path / "aa")
    merge_datasets([tmp_path / "aa", pair[0]], tmp_path / "aaa")
    with pytest.raises(UserError, match="give --mixed-eos"):
        merge_datasets([tmp_path / "aaa", pair[1]], tmp_path / "no")


def test_other_special_ids_and_integers_are_refused(pair: list[Path], tmp_path: Path) -> None:
    """One model file can be imported twice with other tokens as end of sequence."""
    facts = [read_facts(prefix) for prefix in pair]
    other = dataclasses.replace(facts[1], special_ids={**facts[1].special_ids, "eos": 9})
    with pytest.raises(UserError, match="differ in the special ids"):
        check_same([facts[0], other], ["a", "b"], "datasets")
    values = json.loads(facts_path(pair[0]).read_text())
    values |= {"vocab_size": 70000, "token_histogram": [0] * 70000}
    facts_path(pair[0]).write_text(json.dumps(values))
    with pytest.raises(UserError, match="a holds uint16, but int32 belongs to 70,000 tokens"):
        merge_datasets([pair[0]], tmp_path / "out")


@pytest.mark.slow
def test_stored_paths_are_found_from_any_folder(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative ones were given; a tokenizer that has moved is named by --tokenizer."""
    shutil.copytree(corpus / "tokenizer", tmp_path / "data/tokenizer")
    shutil.copy(corpus / "x.jsonl", tmp_path / "x.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    given = [
        "--input",
        "x.jsonl",
        "--tokenizer",
        "data/tokenizer",
        "--output-prefix",
        "data/d",
        "--workers",
        "1",
    ]
    for shard in "01":
        share = ["--num-shards", "2", "--shard-index", shard, "--unit-bytes", "900"]
        assert run_here(preprocess_data.main, [*given, *share], capsys).code == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = [part if part.startswith("-") or part == "1" else f"../{part}" for part in given]
    outcome = run_here(preprocess_data.main, [*again, *share], capsys)
    assert "nothing to do: shard 1 of ../data/d is complete" in outcome.output
    merge = ["--parts", "../data/d.parts", "--output-prefix", "../data/d"]
    assert run_here(merge_tool.main, merge, capsys).code == 0
    assert run_here(inspect_data.main, ["../data/d", "--verify"], capsys).code == 0
    # as earlier versions stored it
    values = json.loads(facts_path(tmp_path / "data/d").read_text())
    facts_path(tmp_path / "data/d").write_text(
        '{\n  "format": 2,\n' + json.dumps({**values, "tokenizer": "data/tokenizer"})[1:]
    )
    assert run_here(inspect_data.main, ["../data/d"], capsys).code == 0
    os.rename(tmp_path / "data/tokenizer", tmp_path / "moved")
    complaint = run_here(inspect_data.main, ["../data/d"], capsys).complaint()
    assert "is not there any more: name it by --tokenizer" in complaint
    merge.append("--overwrite")
    assert "name it by --tokenizer" in run_here(merge_tool.main, merge, capsys).complaint()
    assert run_here(merge_tool.main, [*merge, "--tokenizer", "../moved"], capsys).code == 0
    assert run_here(inspect_data.main, ["../data/d", "--verify"], capsys).code == 0
    again[again.index("../data/tokenizer")] = "../moved"
    assert "nothing to do: ../data/d is complete" in run_here(preprocess_data.main, again, capsys).output


def array(monkeypatch: pytest.MonkeyPatch, task: str, count: int) -> None:
    """Set the environment of a task of ``--array=1-COUNT``."""
    for name, value in (
        ("ID", task),
        ("MIN", "1"),
        ("MAX", str(count)),
        ("COUNT", str(count)),
        ("STEP", "1"),
    ):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)


@pytest.mark.slow
def test_arrays_whose_tasks_have_their_own_corpora(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would write a share of its own dataset, and nobody the rest."""
    for task in "123":
        shutil.copy(corpus / "x.jsonl", tmp_path / f"p{task}.jsonl")
        array(monkeypatch, task, 3)
        given = command(corpus, tmp_path / f"out_{task}", inputs=[tmp_path / f"p{task}.jsonl"])
        complaint = run_here(preprocess_data.main, given, capsys).complaint()
        assert f"out_{task} and --input have the number of a task" in complaint
        assert "give --num-shards 1 if each task has its own corpus" in complaint
        named = command(corpus, tmp_path / f"books_{'abc'[int(task) - 1]}")
        assert "1 units of work for 3 tasks" in run_here(preprocess_data.main, named, capsys).complaint()
        assert run_here(preprocess_data.main, [*given, "--num-shards", "1"], capsys).code == 0
        assert read_facts(tmp_path / f"out_{task}").documents == 97


@pytest.mark.slow
def test_numbers_of_the_environment(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty is as if unset; something else is named; --help needs none of them."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "")
    arguments = command(corpus, tmp_path / "d")
    assert run_here(preprocess_data.main, arguments, capsys).code == 0
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4%2")
    assert "SLURM_ARRAY_TASK_ID is '4%2'" in run_here(preprocess_data.main, arguments, capsys).complaint()
    assert "--shard-index" in run_here(preprocess_data.main, ["--help"], capsys).output


@pytest.mark.parametrize("prefix", [".", "..", "/", "x/.."])
def test_a_prefix_without_a_name_is_refused(
    corpus: Path, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(corpus, Path("d"))
    arguments[arguments.index("d")] = prefix
    for main, given in (
        (preprocess_data.main, arguments),
        (merge_tool.main, ["--datasets", "a", "--output-prefix", prefix]),
        (inspect_data.main, [prefix]),
    ):
        assert "is a folder: add a name, such as" in run_here(main, given, capsys).complaint()


def test_pairs_of_several_keys_are_merged(corpus: Path, tmp_path: Path) -> None:
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "p", PAIRS)
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "t", TEXT)
    assert merge_datasets([tmp_path / "p"], tmp_path / "pp").documents == 97
    with pytest.raises(UserError, match="differ in what it holds"):
        merge_datasets([tmp_path / "p", tmp_path / "t"], tmp_path / "no")
