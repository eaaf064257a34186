"""Train small language models on questions and answers by PUMA and by random masking, and score all alike.

usage: python benchmarks/reproduce_text.py --text gsm8k_train.jsonl --seeds 1 2 3 --jobs 2

The records are those of GSM8K's training file: `question` and `answer`, which ends in a line ``#### NUMBER``.
Those that fit in data.sequence_length are used; those among the last --held-out records of the file are kept
from training and scored: how many answers have the format of the file (lines, then ``#### NUMBER``, then the
end), how many the right number, and the bound on the negative log-likelihood of the true ones, with the
end-of-sequence tokens behind them.
See benchmarks/comparison.py for what is equal in all trainings; the same command resumes an
interrupted comparison. The result is a CSV; benchmarks/plot_reproduction.py draws it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import orjson

import comparison
import trainings
from comparison import BATCH_SIZE, Comparison, Pair, Scores
from pipeline import config as configuration
from pipeline.base.cli import ToolParser, overrides, run
from pipeline.base.errors import UserError
from pipeline.base.files import replacing
from pipeline.checkpoint.load_model import Loaded
from pipeline.corpus.records import Keys, read_all
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


def score(loaded: Loaded, pairs: Sequence[Pair], last: bool) -> Scores:
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


TEXT = Comparison(VARIANTS, frozenset(), score, (*DECODINGS, "number"), KEYS)


def prepare(folder: Path, text: Path, vocabulary: int, length: int, held_out: int) -> list[str]:
    """Make tokenizer, both files and the dataset, once; return the settings that name them.

    Args:
        folder: gets train.jsonl, held_out.jsonl, tokenizer/ and the dataset `pairs`.
        text: file of records.
        vocabulary: tokens of the tokenizer, which is trained on all but the last `held_out` records.
        length: tokens that question, answer and one end-of-sequence token may have together.
        held_out: records that are kept from training.
    """
    tokenizer, pairs = folder / "tokenizer", folder / "pairs"
    files = {name: folder / f"{name}.jsonl" for name in ("train", "held_out")}
    keys = ["--input", str(files["train"]), "--prompt-key", KEYS[0], "--answer-key", KEYS[1]]
    if not pairs.with_suffix(".idx").exists():
        records = [record.texts for record in read_all([text], Keys(KEYS))]
        if len(records) <= held_out:
            raise UserError(f"{text} has {len(records)} records, and --held-out is {held_out}: lower it.")
        parts = {"train": records[:-held_out], "held_out": records[-held_out:]}
        write_pairs(files["train"], parts["train"])
        made = ["--vocab-size", str(vocabulary), "--output", str(tokenizer)]
        trainings.run_tool("tools/train_tokenizer.py", *keys, *made)
        encode = Tokenizer.load(tokenizer).encode
        for name, part in parts.items():
            write_pairs(files[name], [p for p in part if sum(len(encode(t)) for t in p) < length])
        output = ["--tokenizer", str(tokenizer), "--output-prefix", str(pairs)]
        trainings.run_tool("tools/preprocess_data.py", *keys, *output)
    return ["--data.tokenizer", str(tokenizer), "--data.prefixes", f"[{pairs}]"]


def write_pairs(path: Path, pairs: Sequence[Sequence[str]]) -> None:
    """Write a file of records."""
    with replacing(path) as file:
        file.writelines(orjson.dumps(dict(zip(KEYS, pair, strict=True))) + b"\n" for pair in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the variants on the user's text."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--text", type=Path, required=True, help="jsonl with `question` and `answer`")
    comparison.options_of_all(parser, "text", TEXT, steps=2400, interval=400)
    parser.add_argument("--vocab-size", type=int, default=2000, help="tokens of the tokenizer")
    parser.add_argument("--held-out", type=int, default=700, help="records that are kept from training")
    parser.add_argument("--items", type=int, default=200, help="held-out records for the last step")
    parser.add_argument("--curve-items", type=int, default=50, help="held-out records for every point")
    options = comparison.read_options(parser, arguments)
    settings = ["--config", str(options.config), *overrides(options)]
    length = configuration.load(settings).data.sequence_length
    data = prepare(options.folder, options.text, options.vocab_size, length, options.held_out)
    held_out = options.folder / "held_out.jsonl"
    comparison.compare(options, TEXT, data, held_out, options.curve_items, options.items)


if __name__ == "__main__":
    run(main)
