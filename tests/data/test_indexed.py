"""Indexed datasets: the bytes of megatron-core's own builder, and files that are damaged or tampered with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.base.files import sha256_of
from pipeline.data import indexed
from pipeline.data.indexed import Part, find_faults, read_index, read_sequence, token_dtype, write_dataset
from support.corpora import build_with_megatron


def join(parts: Iterable[Part], prefix: Path, dtype: np.dtype[Any], pairs: bool) -> dict[str, str]:
    """Write the dataset of `parts`, in order."""
    return write_dataset((c for part in parts for c in part.chunks(dtype)), prefix, dtype, pairs)


@pytest.mark.parametrize("entries", [2, 4, 2**20])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_join_writes_megatrons_bytes(
    tmp_path: Path, pairs: bool, vocab_size: int, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uint16 and int32, with modes and without, from parts of any size, empty ones included, at any step."""
    monkeypatch.setattr(indexed, "ENTRIES", entries)
    monkeypatch.setattr(indexed, "CHUNK", entries)
    dtype = token_dtype(vocab_size)
    assert dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
    random = np.random.default_rng(0)
    lengths = [0, 5, 3, 1, 0, 9] if pairs else [4, 1, 7]
    sequences = [random.integers(0, vocab_size, n).tolist() for n in lengths]
    per_document = 2 if pairs else 1
    documents = [sequences[i : i + per_document] for i in range(0, len(sequences), per_document)]
    build_with_megatron(tmp_path / "theirs", documents, dtype, pairs)
    parts = []
    for number, part in enumerate([[], documents[:2], documents[2:]]):
        path = tmp_path / f"part{number}"
        path.write_bytes(b"".join(np.array(s, dtype).tobytes() for document in part for s in document))
        parts.append(Part(path, np.array([len(s) for document in part for s in document], np.int32)))
    sha256 = join(parts, tmp_path / "ours", dtype, pairs)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
        assert sha256[suffix] == sha256_of(tmp_path / f"theirs.{suffix}")
    facts = read_index(tmp_path / "ours")
    assert (facts.documents, facts.sequences, facts.tokens) == (3, len(lengths), sum(lengths))
    assert facts.lengths.tolist() == lengths
    assert (facts.modes is not None) == pairs
    assert [read_sequence(tmp_path / "ours", facts, i).tolist() for i in range(len(lengths))] == sequences
    assert find_faults(tmp_path / "ours", facts, vocab_size) == []


def test_every_invariant_is_checked(tmp_path: Path) -> None:
    """Each table, and the tokens, tampered with on its own, is found and named."""
    part = tmp_path / "part"
    part.write_bytes(np.arange(10, dtype=np.uint16).tobytes())
    prefix = tmp_path / "d"
    join([Part(part, np.array([1, 2, 3, 4], np.int32))], prefix, np.dtype(np.uint16), True)
    content = Path(f"{prefix}.idx").read_bytes()
    header = len(indexed.MAGIC) + indexed.HEADER.size
    lengths, offsets, documents, modes = header, header + 16, header + 16 + 32, header + 16 + 32 + 24
    for position, message in [
        (lengths, "sequence 1 does not begin where"),
        (offsets + 8, "sequence 1 does not begin where"),
        (documents + 8, "document 1 does not begin at"),
        (modes + 3, "sequence 3 has the wrong mode"),
    ]:
        Path(f"{prefix}.idx").write_bytes(content[:position] + b"\x09" + content[position + 1 :])
        faults = find_faults(prefix, read_index(prefix), 10)
        assert any(message in fault for fault in faults), (message, faults)
    Path(f"{prefix}.idx").write_bytes(content)
    assert find_faults(prefix, read_index(prefix), 10) == []
    assert find_faults(prefix, read_index(prefix), 9) == ["token 9 is not an id of the vocabulary"]


def test_an_error_leaves_the_old_dataset(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(np.arange(3, dtype=np.uint16).tobytes())
    whole = Part(part, np.array([3], np.int32))
    join([whole], tmp_path / "d", np.dtype(np.uint16), False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileNotFoundError):
        join([whole, Part(tmp_path / "nowhere", whole.lengths)], tmp_path / "d", np.dtype(np.uint16), False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_dataset_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"d.bin does not exist; make it with tools/preprocess_data.py"):
        read_index(tmp_path / "d")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_prefix_with_the_suffix_of_a_file_is_said(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"d{suffix}").touch()
    with pytest.raises(UserError, match=r"name it without its suffix, .*/d"):
        read_index(tmp_path / f"d{suffix}")
