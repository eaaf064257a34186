"""Questions and answers of GSM8K's training file, in words.

The records have a `question` and an `answer`, which ends in a line ``#### NUMBER``. Those that fit in
data.sequence_length are used; those among the last records of the file are kept from training and scored:
how many answers have the format of the file (lines, then ``#### NUMBER``, then the end), how many the right
number, and the bound on the negative log-likelihood of the true ones, with the end-of-sequence tokens behind
them.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks import comparison, trainings
from benchmarks.comparison import BATCH_SIZE, HELD_OUT, Comparison, Scores, Texts
from pipeline.checkpoint.load_model import Loaded
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.completing import complete
from pipeline.decoding.sampling import SamplingSettings
from pipeline.evaluation.pairs import as_trained
from pipeline.evaluation.tasks.gsm8k import final_number

PUMA = "--objective.stages 12"
TURNS_MIXED = f"{PUMA} --objective.turns 32 --objective.random_share 0.25"
VARIANTS = {
    "puma": PUMA,
    "puma_threshold": f"{PUMA} --objective.threshold 0.9",  # as the paper's run on TinyGSM
    "puma_turns": f"{PUMA} --objective.turns 32",
    "puma_turns_mixed": TURNS_MIXED,
    "puma_turns_mixed_threshold": f"{TURNS_MIXED} --objective.threshold 0.9",
    "random": "--objective.kind random_masking",
}
DECODINGS = {
    "format_4": SamplingSettings(tokens_per_step=4),
    "format_1": SamplingSettings(tokens_per_step=1),
}
KEYS = ("question", "answer")
FORMAT = re.compile(r"[^#]*\S\n#### -?\$?\d[\d,]*(\.\d+)?")


def score(loaded: Loaded, pairs: Sequence[Texts], last: bool) -> Scores:
    """Return the share of answers in the file's format by each decoding (the first alone, if not `last`).

    With them come the share of right numbers (of the last decoding), and the bound.
    """
    figures = {}
    for name in list(DECODINGS) if last else list(DECODINGS)[:1]:
        answers = complete(loaded, [question for question, _ in pairs], DECODINGS[name], None, BATCH_SIZE)
        texts = [answer.text.strip() for answer in answers]
        figures[name] = sum(FORMAT.fullmatch(text) is not None for text in texts) / len(texts)
        right = [final_number(t) == final_number(r) for t, (_, r) in zip(texts, pairs, strict=True)]
        figures["number"] = sum(right) / len(right)
    encoded = ([loaded.tokenizer.encode(text).tolist() for text in pair] for pair in pairs)
    return figures | comparison.bound(loaded, [as_trained(*pair, loaded) for pair in encoded])


def prepare(folder: Path, options: Namespace) -> list[str]:
    """Make tokenizer, both files and the dataset of the records of --input, once.

    The tokenizer is trained on all records but those held out; both files hold those that fit.
    """
    length = comparison.sequence_length(options)
    tokenizer, pairs = folder / "tokenizer", folder / "pairs"
    files = {"train": folder / "train.jsonl", "held_out": folder / HELD_OUT}
    keys = ["--input", str(files["train"]), "--prompt-key", KEYS[0], "--answer-key", KEYS[1]]
    if not pairs.with_suffix(".idx").exists():
        parts = dict(zip(files, comparison.split_records(options, KEYS), strict=True))
        trainings.write_records(files["train"], parts["train"], KEYS)
        made = ["--vocab-size", str(options.vocabulary), "--output", str(tokenizer)]
        trainings.run_tool("tools/train_tokenizer.py", *keys, *made)
        encode = Tokenizer.load(tokenizer).encode
        for name, part in parts.items():
            fits = [texts for texts in part if sum(len(encode(text)) for text in texts) < length]
            trainings.write_records(files[name], fits, KEYS)
        output = ["--tokenizer", str(tokenizer), "--output-prefix", str(pairs)]
        trainings.run_tool("tools/preprocess_data.py", *keys, *output)
    return trainings.dataset_settings(tokenizer, pairs, length)


QUESTIONS = Comparison(
    variants=VARIANTS,
    score=score,
    columns=(*DECODINGS, "number"),
    prepare=prepare,
    config="questions",
    steps=2400,
    interval=400,
    count=None,
    items=200,
    curve_items=50,
    held_out=700,
    vocabulary=2000,
    keys=KEYS,
)
