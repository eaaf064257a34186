"""A worker process: reads the records of a unit, encodes them and writes its part."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.files import creating_folder
from pipeline.corpus.encode import WordEncoder
from pipeline.corpus.partition import Partition
from pipeline.corpus.parts import (
    HASH,
    HASHES,
    LENGTHS,
    QUARANTINE,
    TOKENS,
    PartFacts,
    count_tokens,
    part_folder,
    write_part,
)
from pipeline.corpus.reading import DAMAGED, BadRecord, SpanReader
from pipeline.corpus.records import EMPTY, Document, complaint, documents
from pipeline.corpus.sources import Source
from pipeline.corpus.special_text import SpecialEncoder
from pipeline.data.arrays import Array
from pipeline.data.facts import Counts
from pipeline.data.indexed import token_dtype
from pipeline.data.tokenizer import SPACE, Tokenizer

BATCH, BATCH_CHARACTERS = 4096, 2**20  # encoded in one call; each call starts a thread
EXCERPT = 200  # characters of a bad record that are quarantined


class Stopped(Exception):
    """The parent asked the workers to stop."""


@dataclass(frozen=True)
class Job:
    """What every worker of a run is given.

    Attributes:
        partition: of the corpus.
        folder: of the parts.
        on_error: quarantine bad records, or fail at the first.
        whole_texts: encode each text as a whole, not word by word; the tokens are the same.
    """

    partition: Partition
    folder: Path
    on_error: Literal["quarantine", "fail"]
    whole_texts: bool = False


class Board:
    """The workers' progress as the parent sees it: a row of int64 per worker, in shared memory without locks.

    Columns: unit in progress plus 1 (0 if idle), bytes read, tokens written, time of the last heartbeat.
    """

    WIDTH = 4

    def __init__(self, memory: Any, workers: int) -> None:
        table = np.frombuffer(memory, np.int64)
        self.rows = table[:-1].reshape(workers, self.WIDTH)
        self._stop = table[-1:]

    @classmethod
    def memory(cls, context: Any, workers: int) -> Any:
        """Return shared memory for a board."""
        return context.RawArray("q", workers * cls.WIDTH + 1)

    def stop(self) -> None:
        """Ask every worker to stop at its next batch."""
        self._stop[0] = 1

    @property
    def stopping(self) -> bool:
        """Whether the workers were asked to stop."""
        return bool(self._stop[0])


class _PartWriter:
    """Encodes the documents of a unit in batches and writes the files of its part."""

    def __init__(self, folder: Path, encoder: WordEncoder, job: Job) -> None:
        self.folder = folder
        self.tokenizer = encoder.tokenizer
        self.job = job
        self.options = job.partition.options
        self.encoder = SpecialEncoder(encoder) if self.options.keys.messages else encoder
        self.specials = tuple(self.tokenizer.model.specials())
        self.step = 2 if self.options.keys.is_pair else 1  # sequences per document
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.counts = Counts()
        self.histograms = np.zeros((2, self.tokenizer.vocab_size), np.int64)  # prompts; texts or answers
        names = [TOKENS, LENGTHS] + ([HASHES] if self.options.deduplicate else [])
        self.files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in names}
        self.digests = {name: hashlib.sha256() for name in names}
        self._batch: list[Document] = []
        self._batch_size = 0

    def add(self, document: Document) -> bool:
        """Add a document; return whether that filled and encoded a batch."""
        self._batch.append(document)
        self._batch_size += len(document.texts[-1])
        if len(self._batch) < BATCH and self._batch_size < BATCH_CHARACTERS:
            return False
        self.encode()
        return True

    def quarantine(self, source: Source, position: int, bad: BadRecord, content: object) -> None:
        """Record a bad record, or raise a `UserError` with --on-error fail."""
        if self.job.on_error == "fail":
            raise UserError(complaint(source, position, bad))
        self.counts.quarantined[bad.reason] = self.counts.quarantined.get(bad.reason, 0) + 1
        kind = "byte" if source.format in ("lines", "text") else "row"
        entry = {"file": source.path, kind: position, "reason": bad.reason, "detail": bad.detail}
        if not isinstance(content, BadRecord):
            shown = content.decode("utf-8", "replace") if isinstance(content, bytes) else repr(content)
            entry["excerpt"] = shown[:EXCERPT]
        if QUARANTINE not in self.files:
            self.files[QUARANTINE] = (self.folder / QUARANTINE).open("wb")
        self.files[QUARANTINE].write(json.dumps(entry).encode() + b"\n")

    def encode(self) -> None:
        """Encode the batch; count, hash and write its tokens."""
        batch, self._batch, self._batch_size = self._batch, [], 0
        if not batch:
            return
        try:
            found = self.encoder.encode_batch([text for document in batch for text in document.texts])
        except UnicodeEncodeError:  # a lone surrogate of a streamed dataset; JSON and tables have none
            batch = [document for document in batch if self._is_unicode(document)]
            found = self.encoder.encode_batch([text for document in batch for text in document.texts])
        self._count_characters(batch, found)
        lengths = np.fromiter(map(len, found), np.int32, len(found)).reshape(-1, self.step)
        keep = self._judge(batch, lengths)
        if not keep.all():
            chosen = np.flatnonzero(keep)
            batch = [batch[i] for i in chosen]
            found = [found[i * self.step + part] for i in chosen for part in range(self.step)]
            lengths = lengths[keep]
        if self.options.append_eos:
            eos = np.array([self.tokenizer.eos], np.int32)
            ends = range(self.step, len(found) + 1, self.step)
            found = [ids for end in ends for ids in (*found[end - self.step : end], eos)]
        if not found:
            return
        tokens = np.concatenate(found, dtype=self.dtype, casting="unsafe")
        count_tokens(self.histograms, tokens, lengths)
        self.counts.documents += len(lengths)
        self.counts.tokens += len(tokens)
        self._write(TOKENS, tokens.data)
        self._write(LENGTHS, np.ascontiguousarray(lengths).data)
        if self.options.deduplicate:
            self._write(HASHES, b"".join(document_hash(document.texts) for document in batch))

    def _count_characters(self, batch: Sequence[Document], found: Sequence[Array]) -> None:
        texts = [text for document in batch for text in document.texts]
        self.counts.characters += sum(map(len, texts))
        unk, loses_space = self.tokenizer.unk, self.tokenizer.loses_space
        if loses_space or (unk >= 0 and found and (np.concatenate(found) == unk).any()):
            for text, ids in zip(texts, found, strict=True):
                if (loses_space and SPACE in text) or (ids == unk).any():
                    self.counts.lost_characters += self.tokenizer.model.lost(str(text), unk)

    def _is_unicode(self, document: Document) -> bool:
        texts, source, position = document
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            bad = BadRecord("invalid_utf8", f"text that UTF-8 cannot hold ({error.reason})")
            self.quarantine(source, position, bad, texts)
            return False
        return True

    def _judge(self, batch: Sequence[Document], lengths: Array) -> Array:
        """Return a mask [B] of the documents to keep; count eos into `lengths` [B, step] in place."""
        empty = lengths[:, -1] == 0
        for number in np.flatnonzero(empty):
            texts, source, position = batch[int(number)]
            reason, what = ("empty_answer", "an answer") if self.step == 2 else (EMPTY, "a text")
            self.quarantine(source, position, BadRecord(reason, f"{what} of length 0 in tokens"), texts)
        lengths[:, -1] += self.options.append_eos
        sizes = lengths.sum(axis=1, dtype=np.int64)
        limits = {
            "min_tokens": ~empty & (sizes < self.options.min_tokens),
            "max_tokens": ~empty & (sizes > (self.options.max_tokens or np.inf)),
        }
        for name, out in limits.items():
            if out.any():
                self.counts.filtered[name] = self.counts.filtered.get(name, 0) + int(out.sum())
        keep: Array = ~(empty | limits["min_tokens"] | limits["max_tokens"])
        return keep

    def _write(self, name: str, data: Any) -> None:
        self.files[name].write(data)
        self.digests[name].update(data)

    def close(self) -> None:
        """Finish the files; part.json comes last.

        Raises:
            UserError: if text became a special token.
        """
        self.encode()
        self.counts.check()
        self._check_specials()
        for file in self.files.values():
            file.close()
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        facts = PartFacts(self.job.partition.sha256, self.counts, digests)
        write_part(self.folder, facts, self.histograms)

    def _check_specials(self) -> None:
        """Raise a `UserError` unless the special tokens are those that preprocessing itself wrote."""
        expected = {"mask": 0, "pad": 0, "eos": self.counts.documents if self.options.append_eos else 0}
        if self.options.keys.messages:
            del expected["eos"]  # a message format or template may write it, too
        for use, count in expected.items():
            found = int(self.histograms[:, self.tokenizer.special_ids[use]].sum())
            if found != count:
                name = self.tokenizer.model.token(self.tokenizer.special_ids[use])
                raise UserError(
                    f"tokenizer {self.job.partition.tokenizer} encodes text as its {use} token, "
                    f"{name}, {found - count:,} times: import it again with tools/train_tokenizer.py, and "
                    "start over with --restart."
                )


def document_hash(texts: tuple[str, ...]) -> bytes:
    """Return the 128-bit hash of a document's texts; their lengths count, so (ab, c) is not (a, bc)."""
    digest = hashlib.blake2b(digest_size=HASH.itemsize)
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


def make_part(job: Job, encoder: WordEncoder, unit: int, beat: Callable[[int, int], None]) -> Counts:
    """Write the part of a unit, completely or not at all.

    Args:
        job: of the run.
        encoder: of the job's tokenizer.
        unit: its number in the partition.
        beat: called after each batch with the bytes read and the tokens written so far; may raise to stop.

    Raises:
        UserError: for an input that changed; at the first bad record with --on-error fail.
    """
    partition, options = job.partition, job.partition.options
    reading = options.keys.reading(options.max_document_bytes)
    with creating_folder(part_folder(job.folder, unit)) as folder:
        part, before = _PartWriter(folder, encoder, job), 0
        for span in partition.units[unit]:
            source = partition.sources[span.source]
            reader = SpanReader(source, span, reading)
            for position, content in reader:
                part.counts.records += 1
                if isinstance(content, bytes) and (not content or content.isspace()):
                    part.counts.blank += 1
                    continue
                try:
                    found = documents(content, options.keys, source.format == "text", part.specials)
                    if isinstance(content, dict):
                        _check_size(found, options.max_document_bytes)
                except BadRecord as bad:
                    if bad.reason == EMPTY:
                        part.counts.empty += 1
                        continue
                    part.counts.lost_bytes += span.size if bad.reason == DAMAGED else 0
                    part.encode()  # so that the quarantine lists bad records in order
                    part.quarantine(source, position, bad, content)
                    beat(before + reader.done, part.counts.tokens)
                    continue
                part.counts.added_by_splitting += len(found) - 1
                for texts in found:
                    if part.add(Document(texts, source, position)):
                        beat(before + reader.done, part.counts.tokens)
            before += span.size
        part.close()
    beat(before, part.counts.tokens)
    return part.counts


def _check_size(found: Sequence[tuple[str, ...]], limit: int) -> None:
    """Raise a `BadRecord` for a table row that is too long; lines are measured when they are read."""
    for texts in found:
        size = sum(map(len, texts))
        if size * 4 > limit and (size := sum(len(t.encode("utf-8", "replace")) for t in texts)) > limit:
            raise BadRecord("too_long", f"a row of {size} bytes of text, more than {limit}")


_process: dict[str, Any] = {}  # what a worker process keeps between units


def start(job: Job, memory: Any, workers: int, taken: Any) -> None:
    """Initialize a worker process: one thread, Ctrl+C left to the parent, the tokenizer loaded once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with taken.get_lock():
        number = taken.value
        taken.value += 1
    _process.update(
        job=job,
        encoder=WordEncoder(Tokenizer.load(Path(job.partition.tokenizer)), cut=not job.whole_texts),
        board=Board(memory, workers),
        number=number,
    )
    gc.freeze()  # spares the collector what is loaded for good


def _end_with_parent() -> None:
    """Exit when the parent does, even if it is killed: an idle worker would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work(unit: int) -> Counts:
    """Make the part of a unit in a worker process."""
    board: Board = _process["board"]
    row = board.rows[_process["number"]]
    bytes_before, tokens_before = int(row[1]), int(row[2])

    def beat(done: int, tokens: int) -> None:
        row[:] = unit + 1, bytes_before + done, tokens_before + tokens, int(time.time())
        if board.stopping:
            raise Stopped

    beat(0, 0)
    counts = make_part(_process["job"], _process["encoder"], unit, beat)
    row[0] = 0
    return counts
