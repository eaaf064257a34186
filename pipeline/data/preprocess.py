"""A corpus to an indexed dataset: workers read, encode and write parts alone, the parent joins them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.cli import UserError
from pipeline.data.batch import Array
from pipeline.data.indexed import Part, bin_path, idx_path, join, read_index, token_dtype
from pipeline.data.records import Keys, Record, Unit, check_inputs, cut, read
from pipeline.data.tokenizer import Tokenizer
from pipeline.files import replacing
from pipeline.monitor.progress import Progress

FORMAT = 1
UNIT_BYTES = 2**23
BATCH = 512  # documents encoded by one call
REPORT_SECONDS = 10


@dataclass
class DatasetFacts:
    """What PREFIX.json says of a dataset.

    Attributes:
        format: version of the file.
        kind: text, or pairs of prompt and answer.
        tokenizer: folder of the tokenizer, as it was given.
        tokenizer_sha256: its identity.
        vocab_size: its tokens.
        append_eos: whether documents end with the end-of-sequence token.
        documents: number of documents.
        tokens: number of tokens.
        longest_document: tokens of the longest document.
    """

    format: int
    kind: Literal["text", "pairs"]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    append_eos: bool
    documents: int
    tokens: int
    longest_document: int


@dataclass(frozen=True)
class Job:
    """What a worker has to know."""

    tokenizer: Path
    keys: Keys
    append_eos: bool


def facts_path(prefix: Path) -> Path:
    """Return the path of a dataset's facts."""
    return prefix.with_name(prefix.name + ".json")


def read_facts(prefix: str | Path) -> DatasetFacts:
    """Return the facts of a dataset; raise a `UserError` when it is missing or damaged."""
    prefix = Path(prefix)
    index = read_index(prefix)
    path = facts_path(prefix)
    try:
        facts = DatasetFacts(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: preprocess the corpus again.") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): preprocess the corpus again.") from None
    if (facts.documents, facts.tokens) != (index.documents, index.tokens):
        raise UserError(f"{path} and {idx_path(prefix)} do not belong together: preprocess the corpus again.")
    return facts


def preprocess(
    inputs: Sequence[Path], tokenizer: Path, prefix: Path, keys: Keys, append_eos: bool, workers: int
) -> DatasetFacts:
    """Write ``prefix``.bin, .idx and .json; the same bytes for any number of workers.

    A text is a document of one sequence; a pair is a document of two, prompt and answer. The end-of-sequence
    token closes the text or the answer.

    Args:
        inputs: jsonl or txt files.
        tokenizer: folder of the tokenizer.
        prefix: path of the dataset, without suffix.
        keys: what to read of a jsonl line.
        append_eos: close every document with the end-of-sequence token.
        workers: processes.

    Raises:
        UserError: for the first record that cannot be used, or an input that cannot be read.
    """
    check_inputs(inputs, keys)
    made = Tokenizer.load(tokenizer)
    job = Job(tokenizer, keys, append_eos)
    units = [unit for path in inputs for unit in cut(path, UNIT_BYTES)]
    folder = prefix.with_name(f".{prefix.name}.parts")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        parts = list(_parts(job, units, folder, workers))
        lengths = np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)])
        if len(lengths) == 0:
            raise UserError(f"--input {', '.join(map(str, inputs))}: no document in it.")
        facts_path(prefix).unlink(missing_ok=True)
        join(parts, prefix, token_dtype(made.vocab_size), keys.is_pair)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    per_document = lengths.reshape(-1, 2).sum(axis=1) if keys.is_pair else lengths
    facts = DatasetFacts(
        format=FORMAT,
        kind="pairs" if keys.is_pair else "text",
        tokenizer=str(tokenizer),
        tokenizer_sha256=made.sha256,
        vocab_size=made.vocab_size,
        append_eos=append_eos,
        documents=len(per_document),
        tokens=int(lengths.sum(dtype=np.int64)),
        longest_document=int(per_document.max()),
    )
    with replacing(facts_path(prefix)) as file:
        file.write(json.dumps(dataclasses.asdict(facts), indent=2).encode() + b"\n")
    return facts


def _parts(job: Job, units: Sequence[Unit], folder: Path, workers: int) -> Iterator[Part]:
    """Yield the part of each unit, in order, while reporting progress."""
    total = sum(unit.end - unit.start for unit in units)
    progress = Progress(total, 0, "byte")
    done, tokens, started, reported = 0, 0, time.monotonic(), 0.0
    # spawn: the workers inherit no threads and locks of the parent.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (job,)) as pool:
        try:
            paths = [folder / f"{number:06d}" for number in range(len(units))]
            for unit, part in zip(units, pool.map(_write_part, units, paths), strict=True):
                done, tokens = done + unit.end - unit.start, tokens + int(part.lengths.sum(dtype=np.int64))
                progress.advance(done)
                if time.monotonic() - started - reported > REPORT_SECONDS or done == total:
                    reported = time.monotonic() - started
                    progress.report(f"{tokens:,} tokens  {tokens / max(reported, 1e-9):,.0f} tokens/s")
                yield part
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            progress.close()


_worker: dict[str, Any] = {}


def _start_worker(job: Job) -> None:
    """Load the tokenizer once in each worker."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _worker.update(job=job, tokenizer=Tokenizer.load(job.tokenizer))


def _write_part(unit: Unit, path: Path) -> Part:
    """Encode a unit into its own token file."""
    job, tokenizer = _worker["job"], _worker["tokenizer"]
    records, lengths = read(unit, job.keys), []
    with path.open("wb") as file:
        while batch := list(itertools.islice(records, BATCH)):
            sequences = encode(batch, tokenizer, job.append_eos)
            file.write(np.concatenate(sequences).astype(token_dtype(tokenizer.vocab_size)).tobytes())
            lengths.append(np.fromiter(map(len, sequences), np.int32, len(sequences)))
    return Part(path, np.concatenate([np.zeros(0, np.int32), *lengths]))


def encode(records: Sequence[Record], tokenizer: Tokenizer, append_eos: bool) -> list[Array]:
    """Return the sequences of the records: one of a text, two of a pair."""
    sequences = tokenizer.encode_batch([text for record in records for text in record.texts])
    per_record = len(records[0].texts)
    eos = np.array([tokenizer.eos], np.int32)
    for number in range(per_record - 1, len(sequences), per_record):
        if len(sequences[number]) == 0:
            raise UserError(f"{records[number // per_record].place} has an answer of length 0 in tokens.")
        if append_eos:
            sequences[number] = np.concatenate([sequences[number], eos])
    return sequences


def existing(prefix: Path) -> Path | None:
    """Return a file of the dataset at `prefix` that exists, if any."""
    return next((path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()), None)
