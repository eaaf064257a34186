"""What benchmarks that run whole trainings share: puzzles to train on, and trainings side by side."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import orjson

from pipeline.base.errors import EXIT_DONE, Failure
from pipeline.base.files import replacing

ROOT = Path(__file__).resolve().parents[1]
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ONE_THREAD = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
CHARACTERS = 32  # at most, of a tokenizer of characters
PAIR = ("prompt", "answer")  # keys of a record
J, R = TypeVar("J"), TypeVar("R")


def sudoku_settings(folder: Path, size: int, clues: int, count: int, held_out: int = 0) -> list[str]:
    """Make puzzles, tokenizer and dataset in `folder`, once; return the settings that name them.

    Args:
        folder: gets train.jsonl, held_out.jsonl, tokenizer/ and the dataset `pairs`.
        size: rows of a puzzle.
        clues: given cells of a puzzle.
        count: puzzles to train on.
        held_out: puzzles that share no grid with those.
    """
    corpus = folder / "train.jsonl"
    sudoku = ["tools/make_sudoku.py", "--size", str(size), "--clues", str(clues), "--count"]
    if not (folder / "pairs.idx").exists():
        if held_out:
            output = ["--output", str(folder / "held_out.jsonl")]
            run_tool(*sudoku, str(held_out), "--seed", "2", "--split", "held-out", *output)
        run_tool(*sudoku, str(count), "--seed", "1", "--split", "train", "--output", str(corpus))
    return pairs_settings(folder, corpus, 2 * size * size)


def pairs_settings(folder: Path, train: Path, length: int, vocabulary: int | None = None) -> list[str]:
    """Make tokenizer and dataset of prompts and answers in `folder`, once; return settings that name them.

    Args:
        folder: gets tokenizer/ and the dataset `pairs`.
        train: file of records.
        length: tokens of a sequence.
        vocabulary: tokens of the tokenizer; None = one a character.
    """
    tokenizer, pairs = folder / "tokenizer", folder / "pairs"
    keys = ["--input", str(train), "--prompt-key", PAIR[0], "--answer-key", PAIR[1]]
    size = ["--vocab-size", str(vocabulary or CHARACTERS)]
    if not pairs.with_suffix(".idx").exists():
        kind = ["--model-type", "bpe" if vocabulary else "char"]
        run_tool("tools/train_tokenizer.py", *keys, *size, *kind, "--output", str(tokenizer))
        output = ["--tokenizer", str(tokenizer), "--output-prefix", str(pairs)]
        run_tool("tools/preprocess_data.py", *keys, *output)
    return dataset_settings(tokenizer, pairs, length)


def dataset_settings(tokenizer: Path, prefix: Path, length: int) -> list[str]:
    """Return the settings of pipeline.train that name a dataset."""
    names = ["--data.tokenizer", str(tokenizer), "--data.prefixes", f"[{prefix}]"]
    return ["--data.sequence_length", str(length), *names]


def write_records(path: Path, records: Iterable[Sequence[str]], keys: Sequence[str] = PAIR) -> None:
    """Write a file of records."""
    with replacing(path) as file:
        file.writelines(orjson.dumps(dict(zip(keys, texts, strict=True))) + b"\n" for texts in records)


def run_tool(*command: str) -> None:
    """Run one of the project's tools; it ends with this program."""
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, preexec_fn=end_with_parent())


def train(command: Sequence[str], run_dir: Path, variables: Mapping[str, str] = ONE_THREAD) -> None:
    """Run a training to its end, from wherever it stands.

    Args:
        command: of the training.
        run_dir: its folder; log.txt there gets the output.
        variables: added to the environment; by default those for one thread of the CPU.

    Raises:
        Failure: when it ends otherwise.
    """
    with (run_dir / "log.txt").open("a") as log:
        code = subprocess.run(
            command,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=os.environ | variables,
            preexec_fn=end_with_parent(),
        ).returncode
    if code != EXIT_DONE:
        raise Failure(f"the training in {run_dir} ended with exit code {code}: see log.txt there.")


def side_by_side(work: Callable[[J], R], jobs: Sequence[J], processes: int) -> Iterator[R]:
    """Give the result of each job as it is done; `processes` of them work at a time.

    They end with this program, even if it is killed. After an error no more jobs are begun.
    """
    ends = end_with_parent(signal.SIGKILL)
    with ProcessPoolExecutor(processes, get_context("spawn"), ends) as pool:
        try:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def end_with_parent(by: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """Return what a child process calls to be sent a signal when the thread that made it is gone.

    After SIGTERM a training saves; the same command resumes it.
    """
    return partial(_die_with_parent, os.getpid(), by)


def _die_with_parent(parent: int, by: signal.Signals) -> None:
    if LIBC.prctl(PR_SET_PDEATHSIG, int(by), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # gone before
        os.kill(os.getpid(), by)
