"""How near the preprocessor comes to the tokenizer's own speed, and how it compares with Megatron-LM's tool.

Some things are timed on one corpus with the same number of processes, in turn, and the median of each
counts: the ceiling, which is the tokenizer's library alone on texts that are in memory already;
tools/preprocess_data.py, the whole command from start to the joined and hashed dataset, where none was
before; the same with --whole-texts, where it encodes word by word otherwise; and Megatron-LM's
tools/preprocess_data.py where --megatron names a checkout (with a PYTHONPATH that lets it start). The CPU
time of all processes is measured too: on a machine that others use, its ratios are the ones to look at.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError
from pipeline.corpus.encode import LLAMA_3
from pipeline.corpus.tokenizer_making import import_tokenizer, train_tokenizer
from pipeline.data.facts import read_facts
from pipeline.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
BATCH = 512
TRAINING_DOCUMENTS = 2000
ALONE = "the tokenizer alone"


def built_in_words(count: int = 20000) -> Iterator[str]:
    """Yield words of made-up syllables for ever, as often as their rank says (Zipf's law)."""
    chance = random.Random(0)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in ("a", "e", "i", "o", "u", "er", "an", "in")]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(count)]
    weights = [1 / (rank + 2) for rank in range(count)]
    while True:
        yield from chance.choices(words, weights, k=10000)


def documents(texts: Sequence[Path], size: int) -> Iterator[str]:
    """Yield documents of about `size` bytes for ever, of the text files in rounds with other beginnings."""
    if not texts:
        words = built_in_words()
        while True:
            yield " ".join(next(words) for _ in range(size // 6)) + "."
    whole = "\n".join(path.read_text(encoding="utf-8") for path in texts)
    start = 0
    while True:
        yield whole[start : start + size]
        start += size
        if start >= len(whole):
            start = (start * 7919) % size  # the documents of the next round are other ones


def write_corpus(path: Path, texts: Sequence[Path], megabytes: int, size: int) -> None:
    """Write a jsonl corpus of about `megabytes` of text."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in documents(texts, size):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= megabytes * 1e6:
                return


@dataclass(frozen=True)
class Measured:
    """Seconds by the clock, seconds of CPU of all processes, and memory (MB) of the largest process."""

    seconds: float
    cpu: float
    memory: float = 0.0


def encode_share(corpus: Path, tokenizer: Path, share: int, shares: int, ready: Any, times: Any) -> None:
    """Encode every `shares`-th document, read beforehand; note when it began and ended, and its CPU time."""
    with corpus.open("rb") as file:
        texts = [json.loads(line)["text"] for number, line in enumerate(file) if number % shares == share]
    loaded = Tokenizer.load(tokenizer)
    ready.wait()
    row = slice(3 * share, 3 * share + 3)
    began, cpu = time.time(), time.process_time()
    for first in range(0, len(texts), BATCH):
        loaded.encode_batch(texts[first : first + BATCH])
    times[row] = [began, time.time(), time.process_time() - cpu]


def train_byte_level(texts: Iterator[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer as Llama 3's, and import it."""
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<mask>", "<pad>", "</s>"],
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    path = folder.with_suffix(".json")
    model.save(str(path))
    import_tokenizer(path, {}, folder)


def measure_ceiling(corpus: Path, tokenizer: Path, processes: int) -> Measured:
    """Measure the library alone."""
    context = multiprocessing.get_context("spawn")
    ready, times = context.Barrier(processes), context.Array("d", 3 * processes)
    started = [
        context.Process(target=encode_share, args=(corpus, tokenizer, share, processes, ready, times))
        for share in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return Measured(max(times[1::3]) - min(times[::3]), sum(times[2::3]))


def measure_command(command: Sequence[str], environment: dict[str, str]) -> Measured:
    """Measure a whole command with its child processes."""
    started, memory = time.monotonic(), 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=output
        )
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                family = [watched, *watched.children(recursive=True)]
                memory = max(memory, *(each.memory_info().rss for each in family))
            except psutil.Error:  # one has just ended
                pass
            time.sleep(0.1)
        seconds = time.monotonic() - started
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{' '.join(command)} failed: {' '.join(last)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, cpu, memory / 1e6)


def medians(runs: int, measures: dict[str, Callable[[], Measured]]) -> dict[str, Measured]:
    """Return the median of each figure, measured in turn, and the most memory."""
    found: dict[str, list[Measured]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, measure in measures.items():
            one = measure()
            found[name].append(one)
            print(f"  {name}: {one.seconds:.2f} s, {one.cpu:.2f} s of CPU", flush=True)
    return {
        name: Measured(median(m.seconds for m in ms), median(m.cpu for m in ms), max(m.memory for m in ms))
        for name, ms in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument(
        "--text", nargs="*", type=Path, default=[], help="text files (default: made-up words)"
    )
    parser.add_argument("--megabytes", type=int, default=200, help="size of the corpus")
    parser.add_argument("--document-bytes", type=int, default=2000, help="size of a document")
    parser.add_argument("--model-type", choices=["unigram", "bpe", "byte_bpe"], default="unigram")
    parser.add_argument("--vocab-size", type=int, default=8000, help="tokens")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--runs", type=int, default=3, help="times that each is measured")
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM to compare with")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_preprocess"), help="scratch")
    options = parser.parse_args(arguments)
    if options.megatron is not None and options.model_type == "byte_bpe":
        parser.error("--megatron is measured with SentencePiece models only")
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    write_corpus(corpus, options.text, options.megabytes, options.document_bytes)
    made = documents(options.text, options.document_bytes)
    sample = (next(made) for _ in range(TRAINING_DOCUMENTS))
    if options.model_type == "byte_bpe":
        train_byte_level(sample, options.vocab_size, tokenizer)
    else:
        train_tokenizer(sample, options.vocab_size, options.model_type, tokenizer)
    ours = [
        sys.executable, "tools/preprocess_data.py", "--input", str(corpus), "--tokenizer", str(tokenizer),
        "--output-prefix", str(folder / "ours"), "--workers", str(options.workers), "--append-eos",
    ]  # fmt: skip

    def measure_ours(*more: str) -> Measured:
        for earlier in folder.glob("ours*"):
            earlier.unlink()
        return measure_command([*ours, *more], {"PYTHONPATH": str(ROOT)})

    measures: dict[str, Callable[[], Measured]] = {
        ALONE: lambda: measure_ceiling(corpus, tokenizer, options.workers),
        "tools/preprocess_data.py": measure_ours,
    }
    if options.model_type != "unigram":
        measures["the same with --whole-texts"] = lambda: measure_ours("--whole-texts")
    if options.megatron is not None:
        tool = options.megatron.absolute() / "tools/preprocess_data.py"
        theirs = [
            sys.executable, str(tool), "--input", str(corpus), "--output-prefix", str(folder / "theirs"),
            "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{tokenizer}/tokenizer.model",
            "--workers", str(options.workers), "--append-eod",
        ]  # fmt: skip
        measures["Megatron-LM's tool"] = lambda: measure_command(theirs, {})
    found = medians(options.runs, measures)
    tokens = read_facts(folder / "ours").tokens
    size, ceiling = corpus.stat().st_size / 1e6, found[ALONE]
    print(
        f"{size:.0f} MB, {tokens:,} tokens, {options.model_type} {options.vocab_size}, "
        f"{options.workers} processes"
    )
    print("| | s | MB/s | M tokens/s | of the ceiling | CPU s | of its CPU | MB of the largest process |")
    print("|---|---|---|---|---|---|---|---|")
    for name, one in found.items():
        print(
            f"| {name} | {one.seconds:.2f} | {size / one.seconds:.1f} | {tokens / one.seconds / 1e6:.2f} | "
            f"{ceiling.seconds / one.seconds:.2f} | {one.cpu:.2f} | {ceiling.cpu / one.cpu:.2f} | "
            f"{f'{one.memory:.0f}' if one.memory else ''} |"
        )


if __name__ == "__main__":
    run(main)
