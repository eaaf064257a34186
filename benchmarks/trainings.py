"""What benchmarks that run whole trainings share: puzzles to train on, and trainings side by side."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from pipeline.base.errors import EXIT_DONE, Failure

ROOT = Path(__file__).resolve().parents[1]
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
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
    corpus, tokenizer, pairs = folder / "train.jsonl", folder / "tokenizer", folder / "pairs"
    keys = ["--input", str(corpus), "--prompt-key", "prompt", "--answer-key", "answer"]
    sudoku = ["tools/make_sudoku.py", "--size", str(size), "--clues", str(clues), "--count"]
    characters = ["--vocab-size", "16", "--model-type", "char", "--output", str(tokenizer)]
    commands = [
        [*sudoku, str(count), "--seed", "1", "--split", "train", "--output", str(corpus)],
        ["tools/train_tokenizer.py", *keys, *characters],
        ["tools/preprocess_data.py", *keys, "--tokenizer", str(tokenizer), "--output-prefix", str(pairs)],
    ]
    if held_out:
        output = ["--output", str(folder / "held_out.jsonl")]
        commands.insert(0, [*sudoku, str(held_out), "--seed", "2", "--split", "held-out", *output])
    if not pairs.with_suffix(".idx").exists():
        for command in commands:
            run_tool(*command)
    length = ["--data.sequence_length", str(2 * size * size)]
    return [*length, "--data.tokenizer", str(tokenizer), "--data.prefixes", f"[{pairs}]"]


def run_tool(*command: str) -> None:
    """Run one of the project's tools; it ends with this program."""
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, preexec_fn=end_with_parent())


def train(command: Sequence[str], run_dir: Path) -> None:
    """Run a training to its end, from wherever it stands, on one thread of the CPU.

    Args:
        command: of the training.
        run_dir: its folder; log.txt there gets the output.

    Raises:
        Failure: when it ends otherwise.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (run_dir / "log.txt").open("a") as log:
        code = subprocess.run(
            command, stdout=log, stderr=log, cwd=ROOT, env=environment, preexec_fn=end_with_parent()
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
