"""Run the whole pipeline on 4x4 Sudoku in minutes on two CPU cores, and print every command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import EXIT_DONE, UserError
from pipeline.checkpoint.manifest import checkpoints

ROOT = Path(__file__).resolve().parents[1]


def show(command: str) -> list[str]:
    """Print a command as a user would type it; return its words, with the path of this interpreter."""
    print(f"\n$ {command}", flush=True)
    first, *rest = command.split()
    return [sys.executable if first == "python" else first, *rest]


def call(command: str) -> str:
    """Run a command and return the last line it printed; stop the demo if it fails."""
    process = subprocess.Popen(show(command), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    if process.wait() != EXIT_DONE:
        raise UserError(f"the step above failed with exit code {process.returncode}.")
    return last


def environment() -> dict[str, str]:
    """Return the environment of the demo's commands: two ranks on the CPU, one thread each."""
    return os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def interrupt_after_first_checkpoint(run_dir: Path, command: str) -> None:
    """Start training, and kill all its processes once a checkpoint exists."""
    process = subprocess.Popen(show(command), cwd=ROOT, env=environment())
    while not checkpoints(run_dir):
        if process.poll() is not None:
            raise UserError(f"training ended before its first checkpoint, exit code {process.returncode}.")
        time.sleep(0.2)
    time.sleep(2)  # train some steps beyond the checkpoint, to lose them
    everyone = [*psutil.Process(process.pid).children(recursive=True), process]
    for each in everyone:
        each.kill()
    process.wait()
    psutil.wait_procs(everyone[:-1])
    print(
        "\nInterrupted: all processes killed. The same command resumes from the last checkpoint.", flush=True
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo, and print how many held-out puzzles the model solves."""
    parser = ToolParser(__doc__ or "")
    parser.parse_args(arguments)
    started = time.monotonic()
    folder = "runs/demo"
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    puzzles = "python tools/make_sudoku.py --size 4 --clues 8"
    call(f"{puzzles} --count 20000 --seed 1 --split train --output {folder}/train.jsonl")
    call(f"{puzzles} --count 500 --seed 2 --split held-out --output {folder}/held_out.jsonl")
    corpus = f"--input {folder}/train.jsonl --prompt-key prompt --answer-key answer"
    tokenizer, dataset, run_dir = f"{folder}/tokenizer", f"{folder}/train_pairs", f"{folder}/train"
    call(f"python tools/train_tokenizer.py {corpus} --vocab-size 16 --model-type char --output {tokenizer}")
    output = f"--tokenizer {tokenizer} --output-prefix {dataset}"
    call(f"python tools/preprocess_data.py {corpus} {output} --workers 2")
    call(f"python tools/inspect_data.py {dataset} --samples 2")
    ranks = "python -m torch.distributed.run --standalone --nproc_per_node 2"
    train = f"{ranks} -m pipeline.train --config configs/sudoku_demo.yaml"
    interrupt_after_first_checkpoint(ROOT / run_dir, train)
    call(train)
    evaluate = f"python tools/evaluate.py --checkpoint {run_dir} --data {folder}/held_out.jsonl"
    untrained = call(f"{evaluate} --untrained")
    trained = call(evaluate)
    print(
        f"\nThe untrained model: {untrained}.\n"
        f"The curves: .venv/bin/tensorboard --logdir {run_dir}/tensorboard\n"
        f"The demo took {time.monotonic() - started:.0f} s.\n{trained}"
    )


if __name__ == "__main__":
    run(main)
