"""Text, cut into pieces of a fixed length, without a prompt."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from benchmarks import comparison, trainings
from benchmarks.comparison import BATCH_SIZE, HELD_OUT, Comparison, Scores, Texts
from benchmarks.reproduction.arms import arms
from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.batching import MaskedSequence
from pipeline.decoding.completing import fill_sequences
from pipeline.decoding.sampling import SamplingSettings

KEYS = ("text",)
STAGES = 12
GAP = 0.25  # share of a piece, its middle, that is filled in
DECODINGS = {
    "infill_1": SamplingSettings(tokens_per_step=1),
    "infill_4": SamplingSettings(tokens_per_step=4),
}


def score(loaded: Loaded, pairs: Sequence[Texts], last: bool) -> Scores:
    """Return the share of right tokens in the middle of each piece by each decoding, and the bound."""
    pieces = [loaded.tokenizer.encode(text).tolist() for (text,) in pairs]
    length = len(pieces[0])
    gap = range(round(length * (1 - GAP) / 2), round(length * (1 + GAP) / 2))
    masked = [place in gap for place in range(length)]
    blank = [loaded.tokenizer.mask] * len(gap)
    gapped = [MaskedSequence(p[: gap.start] + blank + p[gap.stop :], masked) for p in pieces]
    truth = [token for piece in pieces for token in piece[gap.start : gap.stop]]
    figures = {}
    for name, settings in DECODINGS.items():
        filled = fill_sequences(loaded, gapped, settings, BATCH_SIZE)
        tokens = [token for each in filled for token in each.tokens]
        figures[name] = sum(a == b for a, b in zip(tokens, truth, strict=True)) / len(truth)
    return figures | comparison.bound(loaded, [([], piece) for piece in pieces])


def prepare(folder: Path, options: Namespace) -> list[str]:
    """Make tokenizer, dataset and pieces to score of the texts of --input, once.

    The last documents are held out, as many as --held-out; pieces are spread over them.
    """
    length = comparison.sequence_length(options)
    tokenizer, prefix, train = folder / "tokenizer", folder / "documents", folder / "train.jsonl"
    if not prefix.with_suffix(".idx").exists():
        documents, last = comparison.split_records(options, KEYS)
        trainings.write_records(train, documents, KEYS)
        made = ["--vocab-size", str(options.vocabulary), "--output", str(tokenizer)]
        trainings.run_tool("tools/train_tokenizer.py", "--input", str(train), *made)
        held_out = pieces(last, Tokenizer.load(tokenizer), length, options.items)
        trainings.write_records(folder / HELD_OUT, held_out, KEYS)
        output = ["--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
        trainings.run_tool("tools/preprocess_data.py", "--input", str(train), *output)
    return trainings.dataset_settings(tokenizer, prefix, length)


def pieces(documents: Sequence[Sequence[str]], tokenizer: Tokenizer, length: int, count: int) -> list[Texts]:
    """Return `count` pieces of `length` tokens, spread evenly over the documents.

    A piece is used where its text is encoded to the same tokens again.
    """
    found = []
    for (text,) in documents:
        tokens = tokenizer.encode(text).tolist()
        for start in range(0, len(tokens) - length + 1, length):
            piece = tokenizer.decode(tokens[start : start + length])
            if tokenizer.encode(piece).tolist() == tokens[start : start + length]:
                found.append((piece,))
    if len(found) < count:
        raise UserError(f"--items is {count}, but {len(found)} pieces are held out: raise --held-out.")
    return list(islice(found, 0, None, len(found) // count))[:count]


TEXT = Comparison(
    variants=arms(STAGES),
    score=score,
    columns=tuple(DECODINGS),
    prepare=prepare,
    config="text",
    steps=1200,
    interval=150,
    count=None,
    items=400,
    curve_items=100,
    held_out=100,
    vocabulary=1000,
    keys=KEYS,
)
