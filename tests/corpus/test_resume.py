"""Resuming: killed at any point, the same command gives the same bytes; what has changed is refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.base.errors import UserError
from pipeline.corpus import worker
from pipeline.corpus.encode import WordEncoder
from pipeline.corpus.merge import merge_parts
from pipeline.corpus.partition import write_partition
from pipeline.corpus.parts import PartFacts, missing_units, read_part
from pipeline.corpus.sources import Source
from pipeline.corpus.tokenizer_making import train_tokenizer
from pipeline.corpus.worker import Job, make_part
from pipeline.data.paths import parts_folder
from pipeline.data.tokenizer import Tokenizer
from support.corpora import TEXT, digests, make_dataset, make_parts, partition_of
from support.programs import ROOT, run_here
from tools import preprocess_data

pytestmark = pytest.mark.slow

KILLS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with x.jsonl, about 3 MB of text with some bad lines, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    with (folder / "x.jsonl").open("w") as file:
        for number in range(6000):
            text = " ".join(str(words.randrange(1000)) for _ in range(words.randrange(1, 250)))
            file.write(json.dumps({"text": text}) + "\n" if number % 500 else "bad\n")
    train_tokenizer([" ".join(map(str, range(1000)))], 300, "bpe", folder / "tokenizer")
    return folder


def command(corpus: Path, prefix: Path) -> list[str]:
    """Return the command line, with units small enough to be killed in."""
    return [
        "--input", str(corpus / "x.jsonl"), "--tokenizer", str(corpus / "tokenizer"), "--deduplicate",
        "--output-prefix", str(prefix), "--workers", "2", "--unit-bytes", "100000",
    ]  # fmt: skip


def test_killed_twenty_times_it_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """kill -9 of parent and workers at random moments; parts that were whole stay as they are.

    After a kill the parent's workers are killed too, or are left to notice by themselves that it has gone.
    """
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "whole", deduplicate=True)
    prefix, chance, kills, longest = tmp_path / "d", random.Random(1), 0, 6.0
    folder = parts_folder(prefix)
    while kills < KILLS:
        before = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9]*/part.json")}
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "tools/preprocess_data.py", *command(corpus, prefix)], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            process.wait(chance.uniform(0.1, longest))
        except subprocess.TimeoutExpired:
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            if chance.random() < 0.5:
                for each in workers:
                    each.kill()
            kills += 1
        _, error = process.communicate()
        if (
            process.returncode == 0
        ):  # it was done sooner than the kill: from the beginning, with less patience
            longest = 0.9 * (time.monotonic() - started)
            assert digests(prefix)[:2] == digests(tmp_path / "whole")[:2]
            for suffix in (".bin", ".idx", ".json", ".summary.json", ".quarantine.jsonl"):
                Path(f"{prefix}{suffix}").unlink()
        else:
            assert process.returncode == -signal.SIGKILL, error.decode()
            after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
            assert all(before[path] == time for path, time in after.items()), "a part was made again"
    outcome = subprocess.run(
        [sys.executable, "tools/preprocess_data.py", *command(corpus, prefix)], cwd=ROOT, capture_output=True
    )
    assert outcome.returncode == 0, outcome.stderr.decode()
    assert digests(prefix) == digests(tmp_path / "whole")
    left = {
        path.name for path in tmp_path.iterdir() if path.name.startswith((prefix.name, f".{prefix.name}"))
    }
    assert left == {f"d{s}" for s in (".bin", ".idx", ".json", ".summary.json", ".quarantine.jsonl")}


def test_what_has_changed_is_refused_by_name(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Input, option or tokenizer, after some parts are made; --restart begins anew."""
    source, tokenizer = tmp_path / "x.jsonl", tmp_path / "tokenizer"
    shutil.copy(corpus / "x.jsonl", source)
    shutil.copytree(corpus / "tokenizer", tokenizer)
    partition = partition_of([source], tokenizer, TEXT, 10**6)
    folder = parts_folder(tmp_path / "d")
    write_partition(partition, folder)
    make_part(
        Job(partition, folder, "quarantine"),
        WordEncoder(Tokenizer.load(tokenizer)),
        1,
        lambda done, tokens: None,
    )
    base = [
        "--input",
        str(source),
        "--tokenizer",
        str(tokenizer),
        "--output-prefix",
        str(tmp_path / "d"),
        "--workers",
        "1",
    ]

    def complaint(*more: str) -> str:
        return run_here(preprocess_data.main, [*base, *more], capsys).complaint()

    content = source.read_bytes()
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    assert "--append-eos = False, now it is True" in complaint("--append-eos")
    assert "the keys = ['text'], now it is ['a.b']" in complaint("--text-key", "a.b")
    assert "--split-documents = None, now it is line" in complaint("--split-documents", "line")
    (tmp_path / "more.txt").write_text("more")
    more = str(tmp_path / "more.txt")
    assert f"the list of inputs = 1 files, now it is ['{more}']" in complaint("--input", more)  # one more
    changes: list[tuple[Callable[[], object], str]] = [
        (
            lambda: source.write_bytes(content + b"\n"),
            f"its size = {len(content)}, now it is {len(content) + 1}",
        ),
        (lambda: source.write_bytes(content), "its time of change (ns)"),
        (lambda: source.write_bytes(content[:-3] + b"0" + content[-2:]), "its hash of head and tail"),
    ]
    for change, message in changes:
        change()
        if "hash" in message:
            os.utime(source, ns=times)
        assert message in complaint()
        assert missing_units(folder, len(partition.units))[:2] == [0, 2]
    source.write_bytes(content)
    os.utime(source, ns=times)
    shutil.rmtree(tokenizer)
    train_tokenizer(["another"], 280, "bpe", tokenizer)
    assert "the tokenizer's sha256" in complaint()
    assert "remove" in complaint("--restart", "--num-shards", "2", "--shard-index", "0")
    assert run_here(preprocess_data.main, [*base, "--restart"], capsys).code == 0
    assert not folder.exists()
    before = digests(tmp_path / "d"), (tmp_path / "d.bin").stat().st_mtime_ns
    assert run_here(preprocess_data.main, base, capsys).code == 0, "what is whole is left alone"
    assert (digests(tmp_path / "d"), (tmp_path / "d.bin").stat().st_mtime_ns) == before
    assert "exists: give --overwrite" in complaint("--append-eos")


def test_a_damaged_plan_and_a_second_process_are_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = parts_folder(tmp_path / "d")
    folder.mkdir()
    (folder / "plan.json").write_text("{")
    assert (
        "plan.json cannot be read"
        in run_here(preprocess_data.main, command(corpus, tmp_path / "d"), capsys).complaint()
    )
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True)"
    holder = [sys.executable, "-c", f"{hold}; input()", str(folder / ".lock-00000-of-00001")]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        complaint = run_here(preprocess_data.main, command(corpus, tmp_path / "d"), capsys).complaint()
        assert "another process is working on the same shard" in complaint
        process.communicate(b"\n")


def test_a_full_disk_loses_nothing(corpus: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; with room again the run resumes."""
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "whole", deduplicate=True)
    arguments = " ".join([sys.executable, "tools/preprocess_data.py", *command(corpus, tmp_path / "d")])
    limited = subprocess.run(
        ["bash", "-c", f"ulimit -f 500; {arguments}"], cwd=ROOT, capture_output=True, text=True
    )
    assert limited.returncode == 2
    assert limited.stderr.count("\n") == 1
    assert "File too large. Fix it and run the same command again" in limited.stderr
    parts = len(list(parts_folder(tmp_path / "d").glob("[0-9]*")))
    assert parts > 10, "the join of the parts was what failed"
    assert not list(tmp_path.glob("d.*x"))
    again = subprocess.run(arguments.split(), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "d.summary.json").read_text())["units_done_before"] == parts
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_an_error_in_a_unit_leaves_no_part(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails, or a corpus that vanishes or changes, while a part is being made."""
    source = tmp_path / "x.jsonl"
    shutil.copy(corpus / "x.jsonl", source)
    partition = partition_of([source], corpus / "tokenizer", TEXT, 10**6)
    folder = tmp_path / "d.parts"
    encoder = WordEncoder(Tokenizer.load(corpus / "tokenizer"))
    job = Job(partition, folder, "quarantine")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(worker._PartWriter, "_write", fail)
        with pytest.raises(OSError, match="No space left"):
            make_part(job, encoder, 0, lambda done, tokens: None)
    assert list(folder.iterdir()) == []

    def change(done: int, tokens: int) -> None:
        source.write_bytes(source.read_bytes() + b"\n")

    with pytest.raises(UserError, match="has changed since preprocessing began"):
        make_part(job, encoder, 0, change)
    source.unlink()
    with pytest.raises(UserError, match="has disappeared"):
        make_part(job, encoder, 0, lambda done, tokens: None)
    assert list(folder.iterdir()) == []
    assert Source.of_file(corpus / "x.jsonl").size > 0


def test_a_worker_that_dies_is_said(corpus: Path, tmp_path: Path) -> None:
    """The parent ends with one line, and a second run with the right bytes."""
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "whole", deduplicate=True)
    arguments = [sys.executable, "tools/preprocess_data.py", *command(corpus, tmp_path / "d")]
    process = subprocess.Popen(
        arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while not list(parts_folder(tmp_path / "d").glob("[0-9]*")):
        time.sleep(0.01)
    psutil.Process(process.pid).children()[0].kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker died" in error
    assert subprocess.run(arguments, cwd=ROOT, capture_output=True).returncode == 0
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_a_part_that_is_damaged_later_is_found(corpus: Path, tmp_path: Path) -> None:
    """By its hash when it is joined, and by its size; nothing is written then."""
    partition = partition_of([corpus / "x.jsonl"], corpus / "tokenizer", TEXT, 10**6)
    folder = make_parts(partition, tmp_path / "d")
    path = folder / "000001/tokens"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"000001/tokens is damaged: remove .*000001 and run the same command again"
    ):
        merge_parts(folder, tmp_path / "d")
    (folder / "000001/lengths").write_bytes(b"")
    with pytest.raises(UserError, match=r"000001/lengths is damaged"):
        merge_parts(folder, tmp_path / "d")
    assert not list(tmp_path.glob("d.[bi]*"))


def test_parts_are_joined_as_they_come(corpus: Path, tmp_path: Path) -> None:
    """Each is asked for once and in order; where one does not come, an older dataset stays as it was."""
    make_dataset([corpus / "x.jsonl"], corpus / "tokenizer", tmp_path / "whole")
    partition = partition_of([corpus / "x.jsonl"], corpus / "tokenizer", TEXT, 10**6)
    folder, asked = parts_folder(tmp_path / "d"), []
    encoder = WordEncoder(Tokenizer.load(corpus / "tokenizer"))
    write_partition(partition, folder)

    def made() -> Iterator[PartFacts]:
        for unit in range(len(partition.units)):
            asked.append(unit)
            make_part(Job(partition, folder, "quarantine"), encoder, unit, lambda done, tokens: None)
            yield read_part(folder, unit, partition.sha256)

    def fail() -> Iterator[PartFacts]:
        yield from (read_part(folder, unit, partition.sha256) for unit in range(2))
        raise UserError("a worker died")

    merge_parts(folder, tmp_path / "d", parts=made())
    assert asked == list(range(len(partition.units)))
    assert len(asked) > 2
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")
    with pytest.raises(UserError, match="a worker died"):
        merge_parts(folder, tmp_path / "d", parts=fail())
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".d.*"))


def test_the_lock_is_closed_before_it_is_removed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps the name of an open file, in another form, so that its folder could not be removed."""
    removed, remove = [], shutil.rmtree

    def watched(path: Path, **options: bool) -> None:
        removed.append(Path(path))
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed by a thread that removes another part
                assert not os.readlink(entry).startswith(f"{path}/")
        remove(path, **options)

    monkeypatch.setattr("pipeline.corpus.preprocess.shutil.rmtree", watched)
    preprocess_data.main(command(corpus, tmp_path / "d"))
    assert parts_folder(tmp_path / "d") in removed
    assert not parts_folder(tmp_path / "d").exists()
